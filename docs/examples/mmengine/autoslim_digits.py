"""AutoSlim's first stage on the digits: one network that runs at any width, in five epochs."""

_base_ = ["./digits.py"]

model = dict(
    type="fastslim.AutoSlim",
    architecture=dict(
        type="fastslim.models.resnet18", num_classes=10, in_channels=1, small_images=True, width_mult=0.25
    ),
    mutator=dict(
        type="OneShotChannelMutator",
        channel_unit_cfg=dict(
            type="OneShotMutableChannelUnit",
            default_args=dict(candidate_choices=[i / 12 for i in range(2, 13)], choice_mode="ratio", divisor=4),
        ),
        parse_cfg=dict(type="ChannelAnalyzer", demo_input=(1, 1, 8, 8), tracer_type="BackwardTracer"),
    ),
    distiller=dict(
        type="ConfigurableDistiller",
        teacher_recorders=dict(fc=dict(type="ModuleOutputs", source="fc")),
        student_recorders=dict(fc=dict(type="ModuleOutputs", source="fc")),
        distill_losses=dict(loss_kl=dict(type="KLDivergence", tau=1.0, loss_weight=1.0)),
        loss_forward_mappings=dict(
            loss_kl=dict(
                preds_S=dict(recorder="fc", from_student=True),
                preds_T=dict(recorder="fc", from_student=False),
            )
        ),
    ),
    num_samples=2,
)
# The four passes of a step, max, min and two random subnets, are four updates of the wrapper: one optimizer step.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-4),
    accumulative_counts=4,
)
param_scheduler = dict(type="CosineAnnealingLR", by_epoch=False, T_max=5 * 23)
train_cfg = dict(by_epoch=True, max_epochs=5)
val_cfg = dict(type="SubnetValLoop", calibrate_sample_num=512)
test_cfg = dict(type="SubnetValLoop", calibrate_sample_num=512)
model_wrapper_cfg = dict(type="fastslim.AutoSlimDDP")  # used when there are several processes
