"""Data and runtime of the digits examples: handwritten digits that come with scikit-learn, nothing to download."""

custom_imports = dict(imports=["fastslim.integrations.mmengine"], allow_failed_imports=False)
default_scope = "fastslim"

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="Digits", train=True),
)
val_dataloader = dict(
    batch_size=120,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="Digits", train=False),
)
val_evaluator = dict(type="Accuracy")
test_dataloader = val_dataloader
test_evaluator = val_evaluator

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=20),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
)
randomness = dict(seed=0)
