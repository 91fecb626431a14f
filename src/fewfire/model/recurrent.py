"""The 2017 language model: stacked LSTMs with a noisy top-k MoE between them. Token ids in, logits out.

B sequences, T tokens, D model width, H hidden width, V vocabulary.
Source: Shazeer et al. 2017 (1701.06538), section 5.1 and appendix C.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewfire.config import LayerConfig, LstmConfig, ModelConfig, MoEConfig
from fewfire.errors import ConfigError
from fewfire.model.attention import Context
from fewfire.model.cache import Cache, LayerCache
from fewfire.model.decoder import make_context
from fewfire.model.delta import state_of
from fewfire.model.feedforward import FeedForward
from fewfire.model.moe import MoELayer, Observer


class Lstm(nn.Module):
    """One LSTM layer with torch's gate order (input, forget, cell, output), and a projection where H is not D."""

    def __init__(self, model_dim: int, config: LstmConfig):
        super().__init__()
        hidden = config.hidden_dim
        self.hidden_dim = hidden
        bound = hidden**-0.5
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, model_dim).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        self.out = None if hidden == model_dim else nn.Linear(hidden, model_dim, bias=False)

    def forward(self, x_BTD: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); moves the state in `cache`. Padding changes no state."""
        states = [state_of(cache, name) for name in ("hidden", "cell")]
        hidden_BH, cell_BH = (x_BTD.new_zeros((x_BTD.shape[0], self.hidden_dim)) if s is None else s for s in states)
        if context.real_BT is None:
            weights = (self.weight_ih, self.weight_hh, self.bias, torch.zeros_like(self.bias))
            start = (hidden_BH[None], cell_BH[None])
            y_BTH, hidden_1BH, cell_1BH = torch.lstm(x_BTD, start, weights, True, 1, 0.0, self.training, False, True)
            hidden_BH, cell_BH = hidden_1BH[0], cell_1BH[0]
        else:
            outputs = []
            for t in range(x_BTD.shape[1]):
                keep_B1 = context.real_BT[:, t, None]
                hidden, cell = self.step(x_BTD[:, t], hidden_BH, cell_BH)
                hidden_BH, cell_BH = torch.where(keep_B1, hidden, hidden_BH), torch.where(keep_B1, cell, cell_BH)
                outputs.append(hidden_BH)
            y_BTH = torch.stack(outputs, dim=1)
        if cache is not None:
            cache["hidden"], cache["cell"] = hidden_BH, cell_BH
        return y_BTH if self.out is None else self.out(y_BTH)

    def step(self, x_BD: Tensor, hidden_BH: Tensor, cell_BH: Tensor) -> tuple[Tensor, Tensor]:
        """One token by the definition: the new (hidden, cell)."""
        gates = nn.functional.linear(x_BD, self.weight_ih, self.bias) + nn.functional.linear(hidden_BH, self.weight_hh)
        enter, forget, candidate, leave = gates.chunk(4, dim=-1)
        cell_BH = torch.sigmoid(forget) * cell_BH + torch.sigmoid(enter) * torch.tanh(candidate)
        return torch.sigmoid(leave) * torch.tanh(cell_BH), cell_BH


class RecurrentBlock(nn.Module):
    """x += dropout(lstm(x)); x += dropout(sigmoid(moe(x))). A dense feed-forward is added without the sigmoid."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, index: int, dropout: float):
        super().__init__()
        if not isinstance(layer.mixer, LstmConfig):
            kind = type(layer.mixer).__name__
            raise ConfigError(f"layer {index} of a recurrent model mixes tokens by {kind}; every layer must be an LSTM")
        self.attention = Lstm(config.model_dim, layer.mixer)  # every mixer goes by this name
        self.ffn: nn.Module | None = None
        if isinstance(layer.ffn, MoEConfig):
            self.ffn = MoELayer(config.model_dim, layer.ffn, index)
        elif layer.ffn is not None:
            self.ffn = FeedForward(config.model_dim, layer.ffn)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, context: Context, cache: LayerCache | None, observe: Observer | None) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(x_BTD, context, cache))
        if isinstance(self.ffn, MoELayer):
            return x_BTD + self.dropout(torch.sigmoid(self.ffn(x_BTD, observe)))
        return x_BTD if self.ffn is None else x_BTD + self.dropout(self.ffn(x_BTD))


class Recurrent(nn.Module):
    """Embedding, LSTM and MoE layers with residuals, softmax head; no norms, no positions, no attention.

    `dropout` (0-1) acts on every layer's output in training, as the paper's does; noise in gating likewise.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            RecurrentBlock(config, layer, index, dropout) for index, layer in enumerate(config.layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = None if config.tied_head else nn.Linear(config.model_dim, config.vocab_size, bias=config.head_bias)

    def new_cache(self) -> Cache:
        """An empty cache for one batch of sequences."""
        return Cache(len(self.layers))

    def forward(
        self,
        ids_BT: Tensor,
        cache: Cache | None = None,
        *,
        mask_BT: Tensor | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Logits (B, T, V) float32 of `ids_BT`, the continuation of what `cache` holds; see Decoder.forward."""
        return self.logits(self.hidden(ids_BT, cache, mask_BT=mask_BT, observe=observe))

    def hidden(
        self,
        ids_BT: Tensor,
        cache: Cache | None = None,
        *,
        mask_BT: Tensor | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """(B, T, D): what the head reads."""
        context = make_context(ids_BT, cache, mask_BT)
        x_BTD = self.dropout(self.embed(ids_BT) * self.config.embed_scale)
        for index, block in enumerate(self.layers):
            x_BTD = block(x_BTD, context, None if cache is None else cache.layers[index], observe)
        return x_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32."""
        if self.head is None:
            out = nn.functional.linear(hidden, self.embed.weight.to(hidden.dtype))
        else:
            out = self.head(hidden)
        return out.float() * self.config.logit_scale
