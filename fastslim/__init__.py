"""fastslim: train one network that runs at any width, as fast as the hardware allows."""

import torch  # noqa: F401  (libtorch must be loaded before the extension)

from fastslim import _ext  # noqa: F401
