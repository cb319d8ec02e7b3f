"""What attention keeps of the tokens that were read, so that each new token costs one position.

Megatron-core's own cache (`StaticInferenceContext`) has one offset for all texts of a batch and keeps keys before the
rotation, which is done here; so this one takes its place. It reaches `DocumentAttention` through Megatron's
``attention_mask`` argument, and the model itself holds no state.

S tokens that are new, T slots, B texts, G key/value heads of this rank, D head width.
"""

from __future__ import annotations

import torch

from bigtrain.model.pointwise import rotary_table


class KeyValueCache:
    """Keys and values of a batch of texts, layer by layer: a slot a position.

    Texts may differ in length. Each token is kept at its own position and sees the slots up to it, so a prompt is
    padded at its right: what the padding left in a slot is overwritten before any token sees it."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: positions that there is room for."""
        self.capacity = capacity
        self.begins = True
        """The tokens that are read now are the first ones: positions 0 to S - 1 of every text."""
        self.positions_BS = torch.zeros(0, 0, dtype=torch.long)
        self.num_slots = 0
        """T: slots that the tokens that are read now may see, some of them."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None
        self._seen_BST: torch.Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return not self._layers

    def at(self, positions_BS: torch.Tensor) -> KeyValueCache:
        """Itself, ready for tokens at these positions. The first tokens are those from position 0 on.

        Raises ValueError for a position that there is no room for."""
        self.begins = self.is_empty
        self._angles = self._seen_BST = None  # of all layers alike, so made once a step
        self.positions_BS, self.num_slots = positions_BS, int(positions_BS.max()) + 1
        if self.num_slots > self.capacity:
            raise ValueError(f"position {self.num_slots - 1} of a cache for {self.capacity}")
        return self

    def extended(
        self, layer: int, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new tokens; returns keys and values of all so far, [B, G, T, D] each."""
        if layer not in self._layers:
            _, batch, groups, width = key_SBGD.shape
            # zeros: what is masked must still be a number
            kept = key_SBGD.new_zeros(2, batch, groups, self.capacity, width)
            self._layers[layer] = (kept[0], kept[1])
        rows = torch.arange(key_SBGD.shape[1], device=key_SBGD.device)[:, None]
        for kept, new in zip(self._layers[layer], (key_SBGD, value_SBGD), strict=True):
            kept[rows, :, self.positions_BS] = new.transpose(0, 1)
        keys, values = self._layers[layer]
        return keys[:, :, : self.num_slots], values[:, :, : self.num_slots]

    def seen_BST(self) -> torch.Tensor:
        """Which slots each new token sees."""
        if self._seen_BST is None:
            slots = torch.arange(self.num_slots, device=self.positions_BS.device)
            self._seen_BST = slots <= self.positions_BS[:, :, None]
        return self._seen_BST

    def angles(self, width: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the rotation of each new token, [S, B, width / 2] each; alike in all layers."""
        if self._angles is None:
            cos, sin = rotary_table(self.capacity, width, theta, self.positions_BS.device)
            places_SB = self.positions_BS.t()
            self._angles = cos[places_SB], sin[places_SB]
        return self._angles

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these texts alone (int64 [B])."""
        self._layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self._layers.items()}
