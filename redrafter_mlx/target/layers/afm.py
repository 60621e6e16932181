"""Apple's AFM: layers that read another layer's keys, and count positions by how many there are."""

from __future__ import annotations

from redrafter_mlx.target.state import in_flight


def _reuse(stock, self, x, keys, values, mask=None):
    """Row i of a tree lies at the root's position plus its depth."""
    rotate, depths = self.rope, in_flight().depths
    self.rope = lambda x, offset: rotate(x, offset=offset + depths)
    try:
        return stock(self, x, keys, values, mask)
    finally:
        self.rope = rotate


FUNCTIONS = {}
METHODS = {
    "mlx_lm.models.afm7.KVReuseAttention": {
        "__call__": (_reuse, ("self", "x", "keys", "values", "mask"))
    }
}
