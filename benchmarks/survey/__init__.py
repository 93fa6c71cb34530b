"""Survey of public model families: what `fastslim.convert` makes of networks that were written without it in mind."""
