"""`ConfigurableDistiller`: records of a student and a teacher, connected to losses by a mapping."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastslim import errors
from fastslim.distillers.deliveries import Delivery, DeliveryManager
from fastslim.distillers.recorder_manager import RecorderManager
from fastslim.distillers.recorders import (
    ModuleInputsRecorder,
    ModuleOutputsRecorder,
    ParameterRecorder,
    Recorder,
)
from fastslim.registry import MODELS

Config = Mapping[str, Any]
_RECORD_KEYS = ("recorder", "from_student", "record_idx", "data_idx", "connector", "connector_idx")


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
        connectors: name -> module or config, applied to a record before it reaches a loss. Their parameters
            and the losses' belong to the distiller, so they can be trained.
        distill_losses: name (with ``loss`` in it) -> module or config.
        loss_forward_mappings: loss name -> argument of its ``forward`` -> keywords of :meth:`get_record`. Without
            it every loss gets the student's only record as its first argument and the teacher's as its second.

    Raises:
        FastslimTypeError: something of the wrong kind.
        FastslimValueError: a mapping to a recorder, connector, loss or argument that does not exist.
    """

    def __init__(
        self,
        student_recorders: Mapping[str, Recorder | Config] | None = None,
        teacher_recorders: Mapping[str, Recorder | Config] | None = None,
        distill_deliveries: Mapping[str, Delivery | Config] | None = None,
        connectors: Mapping[str, nn.Module | Config] | None = None,
        distill_losses: Mapping[str, nn.Module | Config] | None = None,
        loss_forward_mappings: Mapping[str, Mapping[str, Config]] | None = None,
    ) -> None:
        super().__init__()
        self.student_recorders = RecorderManager(student_recorders)
        self.teacher_recorders = RecorderManager(teacher_recorders, detach=True)
        self.deliveries = DeliveryManager(distill_deliveries)
        self.connectors = _build_modules("connectors", connectors)
        self.distill_losses = _build_modules("distill_losses", distill_losses)
        for name in self.distill_losses:
            if "loss" not in name:
                raise errors.FastslimValueError(
                    f"distill_losses: {name!r} has no 'loss' in its name, and only such entries are trained; "
                    f"call it 'loss_{name}'"
                )
        if loss_forward_mappings is None:
            loss_forward_mappings = self._default_mappings()
        self.loss_forward_mappings = {name: dict(mapping) for name, mapping in loss_forward_mappings.items()}
        self._check_mappings()

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
        self.student_recorders.prepare_from_model(model)

    def prepare_from_teacher(self, model: nn.Module) -> None:
        """Finds the teacher recorders' sources; raises as :meth:`prepare_from_student`."""
        self.teacher_recorders.prepare_from_model(model)

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
            connector_idx: which element of the connector's output.

        Raises:
            FastslimRuntimeError: nothing was recorded.
            FastslimValueError: an unknown name or an index out of range.
        """
        manager = self.student_recorders if from_student else self.teacher_recorders
        data = manager.get_recorder(recorder).get_record_data(record_idx, data_idx)
        if connector is None:
            return data
        if connector not in self.connectors:
            raise errors.FastslimValueError(
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

    def _default_mappings(self) -> dict[str, dict[str, Config]]:
        students, teachers = list(self.student_recorders.recorders), list(self.teacher_recorders.recorders)
        if not self.distill_losses:
            return {}
        if len(students) != 1 or len(teachers) != 1:
            raise errors.FastslimValueError(
                f"with {len(students)} student and {len(teachers)} teacher recorders it is not clear what the losses "
                "compare: give loss_forward_mappings=dict(<loss>=dict(preds_S=dict(recorder=..., from_student=True), "
                "preds_T=dict(recorder=..., from_student=False)))"
            )
        mappings: dict[str, dict[str, Config]] = {}
        for name, loss in self.distill_losses.items():
            arguments = list(inspect.signature(loss.forward).parameters)
            if len(arguments) < 2:
                raise errors.FastslimValueError(
                    f"{name}: {type(loss).__name__}.forward takes {len(arguments)} argument(s), and a "
                    "distillation loss needs the student's and the teacher's record"
                )
            mappings[name] = {
                arguments[0]: {"recorder": students[0], "from_student": True},
                arguments[1]: {"recorder": teachers[0], "from_student": False},
            }
        return mappings

    def _check_mappings(self) -> None:
        for name, mapping in self.loss_forward_mappings.items():
            if name not in self.distill_losses:
                raise errors.FastslimValueError(
                    f"loss_forward_mappings: there is no loss {name!r}; {errors.nearest(name, self.distill_losses)}"
                )
            _check_arguments(name, self.distill_losses[name], mapping)
            for argument, record in mapping.items():
                self._check_record(f"loss_forward_mappings, {name}.{argument}", record)
        unmapped = [name for name in self.distill_losses if name not in self.loss_forward_mappings]
        if unmapped:
            raise errors.FastslimValueError(
                f"loss_forward_mappings says nothing about {', '.join(unmapped)}: add what it "
                "compares, or drop the loss"
            )

    def _check_record(self, where: str, record: Config) -> None:
        if not isinstance(record, Mapping):
            raise errors.FastslimTypeError(
                f"{where}: a record should be a dict such as dict(recorder='fc', from_student=True), but got {record!r}"
            )
        for key in record:
            if key not in _RECORD_KEYS:
                raise errors.FastslimValueError(f"{where} has no key {key!r}: {errors.nearest(key, _RECORD_KEYS)}")
        for key in _RECORD_KEYS[:2]:
            if key not in record:
                raise errors.FastslimValueError(f"{where} needs {key!r}")
        side = "student" if record["from_student"] else "teacher"
        known = (self.student_recorders if record["from_student"] else self.teacher_recorders).recorders
        if record["recorder"] not in known:
            raise errors.FastslimValueError(
                f"{where}: there is no {side} recorder {record['recorder']!r}; "
                f"{errors.nearest(record['recorder'], known)}"
            )
        connector = record.get("connector")
        if connector is not None and connector not in self.connectors:
            raise errors.FastslimValueError(
                f"{where}: there is no connector {connector!r}; {errors.nearest(connector, self.connectors)}"
            )


def _build_modules(what: str, modules: Mapping[str, nn.Module | Config] | None) -> nn.ModuleDict:
    if not isinstance(modules or {}, (Mapping, nn.ModuleDict)):
        raise errors.FastslimTypeError(f"{what} should be a dict from name to module, but got {type(modules).__name__}")
    built = nn.ModuleDict()
    for name, module in (modules or {}).items():
        if not isinstance(name, str) or "." in name:
            raise errors.FastslimValueError(f"{what}: a name should be a string without dots, but got {name!r}")
        if isinstance(module, Mapping):
            module = MODELS.build(module)
        if not isinstance(module, nn.Module):
            raise errors.FastslimTypeError(
                f"{what}: {name!r} should be a torch.nn.Module or its config, but got {type(module).__name__}"
            )
        built[name] = module
    return built


def _check_arguments(name: str, loss: nn.Module, mapping: Mapping[str, Config]) -> None:
    """Every mapped argument exists, and every argument without a default is mapped."""
    parameters = inspect.signature(loss.forward).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for argument in mapping:
        if argument not in known and not takes_any:
            raise errors.FastslimValueError(
                f"loss_forward_mappings: {type(loss).__name__}.forward of {name!r} has no argument {argument!r}; "
                f"{errors.nearest(argument, known)}"
            )
    missing = [p.name for p in parameters if p.default is p.empty and p.name in known and p.name not in mapping]
    if missing:
        raise errors.FastslimValueError(
            f"loss_forward_mappings: {type(loss).__name__}.forward of {name!r} also needs {', '.join(missing)}"
        )
