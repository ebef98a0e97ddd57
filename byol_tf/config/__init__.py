"""The flags of `main.py`, a module for each part; the library itself reads none of them."""

import math

from absl import flags

from byol_tf.config import data, devices, evaluation, model, optimization, run

MODULES = (run, data, model, optimization, evaluation, devices)


def _fits_int32(number):
    return number is None or abs(number) < 2**31


for _module in MODULES:
    for _flag in flags.FLAGS.get_flags_for_module(_module.__name__):
        if isinstance(_flag.default, float):  # NaN is below no bound
            flags.register_validator(_flag.name, math.isfinite, message="must be a finite number")
        if isinstance(_flag.parser, flags.IntegerParser):  # more overflows inside TensorFlow
            flags.register_validator(_flag.name, _fits_int32, message="must be less than 2**31")
