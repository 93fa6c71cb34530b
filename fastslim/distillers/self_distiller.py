"""Distillers inside one network: MMRazor 0.x's `SelfDistiller`, configured by components, and `BYOTDistiller`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastslim import errors
from fastslim.contract_errors import AssertedValueError
from fastslim.distillers.configurable_distiller import ConfigurableDistiller
from fastslim.distillers.interception import detached
from fastslim.distillers.recorders import ModuleOutputsRecorder
from fastslim.registry import MODELS

_COMPONENT_KEYS = ("student_module", "teacher_module", "losses")


@MODELS.register_module()
class SelfDistiller(ConfigurableDistiller):
    """Compares the outputs of modules of one network, in two of its passes; written as in MMRazor 0.x.

    Use::

        SelfDistiller([dict(student_module="head.fc", teacher_module="head.fc",
                            losses=[dict(type="KLDivergence", name="loss_kd", tau=1.0)])])

    The losses are called ``"loss_kd.0"``, ``"loss_kd.1"``, ...: the number says which call of the modules in a pass
    is compared; a module that runs once has ``.0``.

    Args:
        components: each a dict of ``student_module`` and ``teacher_module``, names of modules, and ``losses``,
            configs with a ``name`` of their own; only what has ``loss`` in its name is trained.
        init_cfg: see :class:`ConfigurableDistiller`.

    Raises:
        FastslimTypeError: something of the wrong kind.
        FastslimValueError: a missing or unknown key, or a loss name that occurs twice.
    """

    def __init__(
        self, components: Sequence[Mapping[str, Any]] | None = None, init_cfg: Mapping[str, Any] | None = None
    ) -> None:
        self_components = [_checked(index, component) for index, component in enumerate(_as_list(components))]
        super().__init__(
            student_recorders={c["student_module"]: _outputs_of(c["student_module"]) for c in self_components},
            teacher_recorders={c["teacher_module"]: _outputs_of(c["teacher_module"]) for c in self_components},
            init_cfg=init_cfg,
        )
        self.components = self_components
        configs: dict[str, Mapping[str, Any]] = {}
        for loss in (loss for component in self.components for loss in component["losses"]):
            if loss["name"] in configs:
                raise errors.FastslimValueError(
                    f"two losses are called {loss['name']!r}, and one would replace the other: give each its own name"
                )
            configs[loss["name"]] = {key: value for key, value in loss.items() if key != "name"}
        self.distill_losses = self.build_distill_losses(configs)

    @property
    def losses(self) -> nn.ModuleDict:
        """The losses by name, under the name that they have in MMRazor 0.x."""
        return self.distill_losses

    def prepare_from_student(self, student: nn.Module) -> None:
        """Finds the modules of both sides, which are those of one network.

        Raises:
            FastslimValueError: a module is not there; names the nearest.
        """
        super().prepare_from_student(student)
        self.prepare_from_teacher(student)

    def exec_teacher_forward(self, teacher: nn.Module, data: Mapping[str, Any]) -> Any:
        """``teacher(**data)`` with its outputs recorded."""
        with self.teacher_pass():
            return teacher(**data)

    def exec_student_forward(self, student: nn.Module, data: Mapping[str, Any]) -> Any:
        """``student(**data)`` with its outputs recorded."""
        with self.student_pass():
            return student(**data)

    def compute_distill_loss(self, data: Any = None) -> dict[str, Tensor]:
        """All losses, as :meth:`compute_distill_losses`.

        Args:
            data: the batch; a loss finds it in its attribute ``current_data``.
        """
        for loss in self.distill_losses.values():
            loss.current_data = data
        try:
            return self.compute_distill_losses()
        finally:
            for loss in self.distill_losses.values():
                loss.current_data = None

    def compute_distill_losses(self) -> dict[str, Tensor]:
        """All losses of the last recorded passes: ``"{name}.{call}"``.

        Raises:
            FastslimRuntimeError: a module did not run, or not as often in the student as in the teacher.
        """
        losses = {}
        for component in self.components:
            student = self.student_recorders.get_recorder(component["student_module"])
            teacher = self.teacher_recorders.get_recorder(component["teacher_module"])
            calls = len(student.data_buffer)
            if calls != len(teacher.data_buffer):
                raise errors.FastslimRuntimeError(
                    f"{student.source!r} ran {calls} time(s) in the student and {teacher.source!r} "
                    f"{len(teacher.data_buffer)} time(s) in the teacher: compare modules that run equally often, and "
                    "run the teacher and the student before the losses"
                )
            for call in range(max(calls, 1)):  # at least one, so that nothing recorded is named
                records = student.get_record_data(call), teacher.get_record_data(call)
                for loss in component["losses"]:
                    losses[f"{loss['name']}.{call}"] = self.distill_losses[loss["name"]](*records)
        return losses


def _outputs_of(module: str) -> ModuleOutputsRecorder:
    return ModuleOutputsRecorder(module)


def _as_list(components: Any) -> Sequence[Any]:
    if not isinstance(components, (list, tuple)) or not components:
        raise errors.FastslimTypeError(
            "components should be a list with at least one dict(student_module=..., teacher_module=..., losses=[...]), "
            f"but got {components!r}"
        )
    return components


def _checked(index: int, component: Any) -> dict[str, Any]:
    where = f"components[{index}]"
    if not isinstance(component, Mapping):
        raise errors.FastslimTypeError(f"{where} should be a dict, but got {type(component).__name__}")
    for key in component:
        if key not in _COMPONENT_KEYS:
            raise errors.FastslimValueError(f"{where} has no key {key!r}: {errors.nearest(key, _COMPONENT_KEYS)}")
    for key in _COMPONENT_KEYS:
        if key not in component:
            raise AssertedValueError(f"{where} needs {key!r}")
    losses = component["losses"]
    if not isinstance(losses, (list, tuple)) or not all(isinstance(loss, Mapping) for loss in losses):
        raise errors.FastslimTypeError(f"{where}: losses should be a list of dicts, but got {losses!r}")
    for loss in losses:
        if "name" not in loss:
            raise AssertedValueError(f"{where}: a loss needs a 'name', such as dict(name='loss_kd', ...): {dict(loss)}")
    return dict(component)


@MODELS.register_module()
class BYOTDistiller(ConfigurableDistiller):
    """Be your own teacher (Zhang et al., ICCV 2019, arXiv:1905.08094): what connectors make of a teacher's record is
    detached, too. One connector can so give the student's and the teacher's side.

    The arguments are those of :class:`ConfigurableDistiller`.
    """

    def get_record(
        self,
        recorder: str,
        from_student: bool,
        record_idx: int = 0,
        data_idx: int | None = None,
        connector: str | None = None,
        connector_idx: int | None = None,
    ) -> Any:
        """One record, see :meth:`ConfigurableDistiller.get_record`; the teacher's without a graph."""
        data = super().get_record(recorder, from_student, record_idx, data_idx, connector, connector_idx)
        return data if from_student else detached(data)
