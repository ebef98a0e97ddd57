"""BYOL, "Bootstrap Your Own Latent" (Grill et al. 2020), for TensorFlow.

The names below are the library; they are imported on first use, so that `main.py` can read
its flags before TensorFlow loads.
"""

import importlib

_HOME = {
    "BYOL": "model",
    "LARS": "optimizers",
    "TargetNetworkUpdate": "target_update",
    "WarmupCosine": "schedules",
    "Supervised": "supervised",
    "UserError": "errors",
    "augment_batch": "data.views",
    "eval_batches": "data.views",
    "export_encoder": "export",
    "extract_features": "evaluation",
    "fine_tune": "finetune",
    "import_deepmind": "deepmind",
    "knn_accuracy": "evaluation",
    "linear_evaluation": "linear_eval",
    "linear_probe_accuracy": "evaluation",
    "load_deepmind": "deepmind",
    "load_source": "data.source",
    "make_optimizer": "optimizers",
    "pretrain_batches": "data.views",
    "resnet_encoder": "resnet",
    "steps_per_epoch": "data.views",
    "target_ema": "schedules",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'byol_tf' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"byol_tf.{_HOME[name]}"), name)
    globals()[name] = value
    return value
