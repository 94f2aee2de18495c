"""The one thing that travels from host to device: a packed batch of fixed shape.

Letter legend, used in every docstring and einsum of the package:
  B rows        S tokens a row       K texts a row at most      R vision rows     P patches a vision row
  F uint8 values of a patch (channels * patch * patch)          m merge size (2)  H hidden size of the decoder
  I images a row may see, for backbones that keep their features out of the row
  N pairs       T objectives         L layers                   A query heads     G key/value heads   D head dim

A row holds several *groups*, each laid out once as  [prefix][text 1][text 2]...  (DESIGN 3.2): the prefix is the
system message, the request and the image tokens; each text restarts its positions at the end of its prefix. One rule
says which key `k` a query `q` of the same row may see:

    k <= q  and  segment[q] > 0  and  (segment[k] == segment[q]  or  segment[k] == prefix[q])

A vision row holds the patches of one or more images, which see each other only inside `patch_segment`.
"""

from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
MIX_UNIT = 2.0**-24


class PackedBatch(NamedTuple):
    """Host (NumPy) or device (jax) arrays of one packed step.

    Attributes:
      tokens: int32[B, S], token ids; image placeholders at image positions, 0 at padding.
      positions: int32[B, S, 3], rotary positions (time, height, width); equal on all axes for text and in flat mode.
      segment: int32[B, S], id of the run (a prefix or a text) the token belongs to, from 1 in each row; 0 is padding.
      prefix: int32[B, S], id of the run that the token sees besides its own; its own id inside a prefix, 0 at padding.
      image_cell: int32[B, S], index of the merged vision cell whose feature replaces the token embedding, counted over
        the flattened [R * P / m^2] cells of the batch; -1 for tokens that are no image token.
      pool: int32[B, K], column of the last token of each text; 0 where there is none.
      record: int32[B, K], index of the record within the step; -1 where there is none.
      target: float32[B, K], human score in [0, 1]; 0 where there is none.
      weight: float32[B, K], 1 for a pair that counts in the loss, 0 otherwise.
      image_token: int32[B, I], columns of a row's image tokens, -1 where there is none, for backbones that keep image
        features out of the row (`image_cell` there names the image they see); I = 0 for all others.
      patches: uint8[R, P, F], raw pixel values in the layout's patch order, features (C, ph, pw).
      patch_position: int32[R, P, 2], (row, column) of the patch in its image. Or, where maps of features are resized,
        int32[R, P, 6]: what the patch's cell is mixed from: upper left, upper right, lower left and lower right patch,
        counted from the image's first, and the weights of right and of lower in multiples of `MIX_UNIT`. Or, where the
        view of a whole is made of its tiles, int32[R, P, 4]: row of the patch's tile, tiles down, column, tiles across;
        zeros in the block of the whole, whose pixels are zeros too.
      patch_segment: int32[R, P], id of the image within the vision row, from 1; 0 is padding.
    """

    tokens: Array
    positions: Array
    segment: Array
    prefix: Array
    image_cell: Array
    pool: Array
    record: Array
    target: Array
    weight: Array
    image_token: Array
    patches: Array
    patch_position: Array
    patch_segment: Array
