"""What single model families need of their own, a file each.

A file names the functions (FUNCTIONS, by mlx-lm's module) and methods (METHODS, by class) that it
replaces when rows may be rejected, with the parameters that these are known to take.
"""

from redrafter_mlx.target.layers import (
    afm,
    baichuan,
    lightning,
    llama4,
    longcat,
    mamba,
    positions,
    recurrent_gemma,
    rwkv7,
)

_ALL = (afm, baichuan, lightning, llama4, longcat, mamba, positions, recurrent_gemma, rwkv7)
FUNCTIONS = {name: found for each in _ALL for name, found in each.FUNCTIONS.items()}
METHODS = {name: found for each in _ALL for name, found in each.METHODS.items()}
