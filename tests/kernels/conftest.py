"""Triton's interpreter, where there is no GPU, without its slowest part and without what it leaves behind."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    # The interpreter replaces the functions of triton.language while a kernel runs. For every call of a @triton.jit
    # function inside it does so once more, which costs milliseconds, and then forgets to put triton.language.core
    # back, so that nothing can be compiled in this process any more. Here a launch does it once, and undoes it.
    _patch = interpreter._patch_lang

    class _Patches:
        def __init__(self, fn):
            self.scopes = [_patch(fn), _patch(tl.zeros.fn)]  # tl.zeros is a @triton.jit function that sees tl.core

        def restore(self):
            for scope in reversed(self.scopes):
                if scope is not None:
                    scope.restore()

    interpreter._patch_lang = _Patches
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
