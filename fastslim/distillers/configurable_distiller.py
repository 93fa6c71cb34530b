"""`ConfigurableDistiller`: records of a student and a teacher, connected to losses by a mapping."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastslim import errors
from fastslim.contract_errors import AssertedTypeError, UnknownNameError
from fastslim.distillers.deliveries import DistillDelivery, DistillDeliveryManager
from fastslim.distillers.loss_mappings import Config, Names, check_mappings, default_mappings
from fastslim.distillers.recorder_manager import RecorderManager
from fastslim.distillers.recorders import (
    ModuleInputsRecorder,
    ModuleOutputsRecorder,
    ParameterRecorder,
    Recorder,
)
from fastslim.registry import MODELS


@MODELS.register_module()
class ConfigurableDistiller(nn.Module):
    """Makes distillation losses from what recorders saw in a student and in its teacher.

    Use::

        distiller.prepare_from_teacher(teacher)
        distiller.prepare_from_student(student)
        with distiller.teacher_pass():
            teacher(images)
        with distiller.student_pass():
            student(images)
        losses = distiller.compute_distill_losses()
        distiller.clear()

    Teacher and student may be one network at two widths. The teacher's records are detached.

    Args:
        student_recorders: name -> recorder or config, ``dict(fc=dict(type="ModuleOutputs", source="classifier.1"))``.
        teacher_recorders: the same for the teacher.
        distill_deliveries: name -> delivery or config; results of functions handed from teacher to student.
        connectors: name -> module, config, or a list of these that run one after the other; applied to a record
            before it reaches a loss. Their parameters and the losses' belong to the distiller, so they can be trained.
        distill_losses: name -> module or config. Those with ``loss`` in their name are trained, others only reported.
        loss_forward_mappings: loss name -> argument of its ``forward`` -> keywords of :meth:`get_record`. Without
            it every loss gets the student's only record as its first argument and the teacher's as its second.
        init_cfg: how :meth:`init_weights` of a framework that has one (mmengine) initialises; only kept here.

    Raises:
        FastslimTypeError: something of the wrong kind.
        FastslimValueError: a mapping to a recorder, connector, loss or argument that does not exist.
    """

    def __init__(
        self,
        student_recorders: Mapping[str, Recorder | Config] | None = None,
        teacher_recorders: Mapping[str, Recorder | Config] | None = None,
        distill_deliveries: Mapping[str, DistillDelivery | Config] | None = None,
        connectors: Mapping[str, nn.Module | Config | Sequence[nn.Module | Config]] | None = None,
        distill_losses: Mapping[str, nn.Module | Config] | None = None,
        loss_forward_mappings: Mapping[str, Mapping[str, Config]] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.init_cfg = init_cfg
        self.student_recorders = RecorderManager(student_recorders)
        self.teacher_recorders = RecorderManager(teacher_recorders, detach=True)
        shared = {*self.student_recorders.recorders.values()} & {*self.teacher_recorders.recorders.values()}
        if shared:
            raise errors.FastslimValueError(
                f"{shared.pop()} records the student and the teacher, and one would overwrite the other: make two"
            )
        self.deliveries = DistillDeliveryManager(distill_deliveries)
        self.connectors = self.build_connectors(connectors)
        self.distill_losses = self.build_distill_losses(distill_losses)
        names = Names(self.student_recorders.recorders, self.teacher_recorders.recorders, self.connectors)
        losses = dict(self.distill_losses.items())
        if loss_forward_mappings is None:
            loss_forward_mappings = default_mappings(losses, names)
        self.loss_forward_mappings = check_mappings(loss_forward_mappings, losses, names)

    def build_connectors(
        self, connectors: Mapping[str, nn.Module | Config | Sequence[nn.Module | Config]] | None = None
    ) -> nn.ModuleDict:
        """Connectors by name; a list becomes a :class:`torch.nn.Sequential`."""
        return _build_modules("connectors", connectors, lists=True)

    def build_distill_losses(self, losses: Mapping[str, nn.Module | Config] | None = None) -> nn.ModuleDict:
        """Losses by name; warns of a name without ``loss``, whose value is reported and not trained."""
        built = _build_modules("distill_losses", losses)
        for name in built:
            if "loss" not in name:
                warnings.warn(
                    f"Warning: If {name} is a loss to be trained, its name must say so: call it 'loss_{name}'. "
                    "Entries of distill_losses without 'loss' in their name are only reported",
                    stacklevel=3,
                )
        return built

    @property
    def recorded_modules(self) -> set[str]:
        """Names of the modules that recorders watch; an execution plan must run each of them by itself."""
        return {r.source for r in self._recorders() if isinstance(r, (ModuleInputsRecorder, ModuleOutputsRecorder))}

    @property
    def needs_own_forward(self) -> bool:
        """Whether only the network's own forward shows everything: functions, methods or the whole model are watched.

        A traced plan calls the functions that it was traced with, not those that recorders put in their place.
        """
        kinds = (ModuleInputsRecorder, ModuleOutputsRecorder, ParameterRecorder)
        watches_calls = any(not isinstance(recorder, kinds) for recorder in self._recorders())
        return watches_calls or "" in self.recorded_modules or bool(self.deliveries.deliveries)

    def prepare_from_student(self, model: nn.Module) -> None:
        """Finds the student recorders' sources.

        Raises:
            FastslimValueError: a source is not there; names the nearest.
        """
        self.student_recorders.initialize(model)

    def prepare_from_teacher(self, model: nn.Module) -> None:
        """Finds the teacher recorders' sources; raises as :meth:`prepare_from_student`."""
        self.teacher_recorders.initialize(model)

    @contextlib.contextmanager
    def teacher_pass(self) -> Iterator[None]:
        """Around the teacher's forward: its recorders record, and deliveries keep what they will hand out."""
        self.set_deliveries_override(False)
        with self.teacher_recorders, self.deliveries:
            yield

    @contextlib.contextmanager
    def student_pass(self) -> Iterator[None]:
        """Around a student's forward: its recorders record, and deliveries answer with the teacher's results."""
        self.set_deliveries_override(True)
        with self.student_recorders, self.deliveries:
            yield

    def set_deliveries_override(self, override: bool) -> None:
        """False before the teacher runs (deliveries record), True before a student runs (they replay)."""
        self.deliveries.override_data = override

    def get_record(
        self,
        recorder: str,
        from_student: bool,
        record_idx: int = 0,
        data_idx: int | None = None,
        connector: str | None = None,
        connector_idx: int | None = None,
    ) -> Any:
        """One record, passed through a connector if one is named.

        Args:
            recorder: its name.
            from_student: the student's recorder, or the teacher's.
            record_idx: which call of its source.
            data_idx: which element of a record that is a tuple or list.
            connector: name of a connector.
            connector_idx: which element of the connector's output, or of the record if there is none.

        Raises:
            FastslimRuntimeError: nothing was recorded.
            FastslimValueError: an unknown name or an index out of range.
        """
        manager = self.student_recorders if from_student else self.teacher_recorders
        data = manager.get_recorder(recorder).get_record_data(record_idx, data_idx)
        if connector is not None:
            if connector not in self.connectors:
                raise UnknownNameError(
                    f"there is no connector {connector!r}; {errors.nearest(connector, self.connectors)}"
                )
            data = self.connectors[connector](data)
        return data if connector_idx is None else data[connector_idx]

    def compute_distill_losses(self) -> dict[str, Tensor]:
        """All losses of the last recorded forward passes, by name.

        Raises:
            FastslimRuntimeError: a record is missing; names its recorder.
        """
        losses = {}
        for name, mapping in self.loss_forward_mappings.items():
            arguments = {argument: self.get_record(**record) for argument, record in mapping.items()}
            losses[name] = self.distill_losses[name](**arguments)
        return losses

    def clear(self) -> None:
        """Drops all records and what deliveries hold, and with them the graphs."""
        self.student_recorders.clear()
        self.teacher_recorders.clear()
        self.deliveries.clear()

    def _recorders(self) -> list[Recorder]:
        return [*self.student_recorders.recorders.values(), *self.teacher_recorders.recorders.values()]


def _build_modules(what: str, modules: Any, *, lists: bool = False) -> nn.ModuleDict:
    if not isinstance(modules or {}, (Mapping, nn.ModuleDict)):
        raise errors.FastslimTypeError(f"{what} should be a dict from name to module, but got {type(modules).__name__}")
    built = nn.ModuleDict()
    for name, module in (modules or {}).items():
        if not isinstance(name, str) or "." in name:
            raise errors.FastslimValueError(f"{what}: a name should be a string without dots, but got {name!r}")
        if hasattr(built, name):
            raise errors.FastslimValueError(f"{what}: {name!r} is a name that torch's modules use; choose another")
        if lists and isinstance(module, (list, tuple)):
            built[name] = nn.Sequential(*(_build_module(f"{what}: each of {name!r}", one) for one in module))
        else:
            built[name] = _build_module(f"{what}: {name!r}", module)
    return built


def _build_module(where: str, module: Any) -> nn.Module:
    if isinstance(module, Mapping):
        module = MODELS.build(module)
    if not isinstance(module, nn.Module):
        raise AssertedTypeError(f"{where} should be a torch.nn.Module or its config, but got {type(module).__name__}")
    return module
