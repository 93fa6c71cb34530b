"""Runs every CUDA C++ kernel once on small shapes, for compute-sanitizer to watch; compares nothing."""

from __future__ import annotations

import argparse

import torch
from kernel_cases import small_cases
from kernel_times import usable

from fastslim.ops import backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="the CPU's kernels, on the CPU")
    dry = parser.parse_args().dry_run
    device, name = (torch.device("cpu"), "cpp") if dry else (torch.device("cuda"), "cuda")
    ran: dict[str, int] = {}
    refused = set()
    for dtype in (torch.float32, torch.bfloat16) if dry else (torch.float32, torch.bfloat16, torch.float16):
        for case in small_cases():
            if name not in backend.registered_ops().get(case.op, ()):
                continue
            prepared, reason = usable(case, name, case.inputs(device, dtype), dtype)
            if prepared is None:
                refused.add(f"{case.op}: {reason}")
            else:
                ran[case.op] = ran.get(case.op, 0) + 1
    if not dry:
        torch.cuda.synchronize()
    for line in sorted(refused):
        print(line)
    print("ran " + (", ".join(f"{count} calls of {op}" for op, count in ran.items()) or "nothing"))
    if not ran:
        raise SystemExit("no kernel of ours ran")


if __name__ == "__main__":
    main()
