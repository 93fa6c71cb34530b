"""AutoSlim's second stage: the best widths for two budgets, from a checkpoint given as `load_from`."""

_base_ = ["./autoslim_digits.py"]

train_cfg = None
train_dataloader = None
optim_wrapper = None
param_scheduler = None
val_cfg = None
val_dataloader = None
val_evaluator = None
test_cfg = dict(_delete_=True, type="AutoSlimGreedySearchLoop", target_flops=(1.0, 0.5))
