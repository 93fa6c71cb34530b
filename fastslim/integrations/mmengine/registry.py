"""Fastslim's part of mmengine's registries: the scopes `fastslim` and, where MMRazor is not installed, `mmrazor`."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, MutableMapping
from typing import Any

from mmengine import registry as roots
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

import fastslim.registry
from fastslim import errors
from fastslim.registry import own_scopes, without_scope


class ScopedRegistry(Registry):
    """A child of one of mmengine's registries, for one scope.

    Args:
        root: mmengine's registry.
        scope: what a type is written with, ``"fastslim.AutoSlim"``.
        classes: what is registered; the scopes of one root share it.
    """

    def __init__(self, root: Registry, scope: str, classes: MutableMapping[str, Any]) -> None:
        super().__init__(root.name, parent=root, scope=scope, locations=["fastslim.integrations.mmengine"])
        self._module_dict = classes

    def get(self, key: str) -> Any:
        """What is registered by this name here, at mmengine, or in another library's scope that `key` begins with.

        Raises:
            FastslimValueError: nothing is; names the nearest.
        """
        self.import_from_location()
        name = without_scope(key)
        for registry in (self, self.root):
            if name in registry.module_dict:
                return registry.module_dict[name]
        if "." in key and key.partition(".")[0] not in own_scopes():
            try:
                return super().get(key)
            except RuntimeError as error:
                raise errors.FastslimValueError(self._unknown(key)) from error
        if "." in name:  # the path of an object, "fastslim.models.resnet18"
            try:
                return get_object_from_string(f"fastslim.{name}")
            except (ImportError, AttributeError) as error:
                raise errors.FastslimValueError(self._unknown(key)) from error
        raise errors.FastslimValueError(self._unknown(key))

    def build(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """Builds what a config describes; a name of ours is found whatever the default scope is.

        Args:
            cfg: a dict, or a config of mmengine.
            *args: of mmengine's ``Registry.build``.
            **kwargs: likewise.
        """
        kind = cfg.get("type") if hasattr(cfg, "keys") else None
        if isinstance(kind, str) and cfg.get("_scope_", self.scope) in own_scopes():
            own = self.module_dict.get(without_scope(kind))
            if own is not None:
                cfg = {**{key: cfg[key] for key in cfg}, "type": own}
        return super().build(cfg, *args, **kwargs)

    def _unknown(self, key: str) -> str:
        known = [*self.module_dict, *self.root.module_dict]
        return (
            f"{key!r} is not registered in the {self.name} registry of the scope {self.scope!r}: "
            f"{errors.nearest(key.rpartition('.')[2], known)}; a class of your own needs @register_module() of "
            "mmengine's or fastslim's registry, and its file in custom_imports"
        )


def _children(root: Registry, *more: MutableMapping[str, Any]) -> Registry:
    """Fastslim's child of a root; all scopes of ours share what it holds."""
    classes: MutableMapping[str, Any] = ChainMap({}, *more)
    registries = [ScopedRegistry(root, scope, classes) for scope in own_scopes()]
    return registries[0]


# A child of every root: with default_scope="fastslim" mmengine looks for all it builds in that scope first.
DATASETS = _children(roots.DATASETS)
DATA_SAMPLERS = _children(roots.DATA_SAMPLERS)
EVALUATOR = _children(roots.EVALUATOR)
FUNCTIONS = _children(roots.FUNCTIONS)
HOOKS = _children(roots.HOOKS)
INFERENCERS = _children(roots.INFERENCERS)
LOG_PROCESSORS = _children(roots.LOG_PROCESSORS)
LOOPS = _children(roots.LOOPS)
METRICS = _children(roots.METRICS)
#: Also holds, live, all that is in :data:`fastslim.registry.MODELS`; what is registered here stays mmengine's.
MODELS = _children(roots.MODELS, fastslim.registry.MODELS.module_dict)
MODEL_WRAPPERS = _children(roots.MODEL_WRAPPERS)
OPTIMIZERS = _children(roots.OPTIMIZERS)
OPTIM_WRAPPERS = _children(roots.OPTIM_WRAPPERS)
OPTIM_WRAPPER_CONSTRUCTORS = _children(roots.OPTIM_WRAPPER_CONSTRUCTORS)
PARAM_SCHEDULERS = _children(roots.PARAM_SCHEDULERS)
RUNNERS = _children(roots.RUNNERS)
RUNNER_CONSTRUCTORS = _children(roots.RUNNER_CONSTRUCTORS)
STRATEGIES = _children(roots.STRATEGIES)
TASK_UTILS = _children(roots.TASK_UTILS)
TRANSFORMS = _children(roots.TRANSFORMS)
VISBACKENDS = _children(roots.VISBACKENDS)
VISUALIZERS = _children(roots.VISUALIZERS)
WEIGHT_INITIALIZERS = _children(roots.WEIGHT_INITIALIZERS)


class _Mmengine:
    """The parent of fastslim's own registry: names that it does not have are looked up by mmengine's rules."""

    def get(self, name: str, scope: str | None = None) -> Any:
        """What mmengine finds by this name, in the given or the default scope; None if nothing."""
        with MODELS.switch_scope_and_registry(scope) as registry:
            try:
                return registry.get(name)
            except errors.FastslimValueError:
                return None
            except RuntimeError as error:  # mmengine's way of saying no
                if "Failed to get" in str(error):
                    return None
                raise

    def build(self, config: dict[str, Any]) -> Any:
        """Builds it as mmengine does."""
        return MODELS.build(config)

    def names(self) -> Iterable[str]:
        """Names in fastslim's scope and at mmengine."""
        return [*MODELS.module_dict, *roots.MODELS.module_dict]


fastslim.registry.MODELS.parent = _Mmengine()
