"""The flags of `main.py`, a module for each part; the library itself reads none of them."""

from byol_tf.config import data, devices, model, optimization, run

MODULES = (run, data, model, optimization, devices)
