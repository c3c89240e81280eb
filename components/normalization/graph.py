"""Normalization as a part of the network: raw features in, normalized features out, at training and at serving."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.normalization.spec import FeatureNormalization, NormalizationSpec

CLAMP = 6.0
"""Normalized values lie in [-6, 6]: a wild value moves the network no further than an extreme one."""


class NormalizationGraph(nn.Module):
    """Normalizes a batch of raw features; a missing value (NaN) becomes the normalized mean, 0.

    binary: x != 0. probability: standardized logit. continuous: standardized. box_cox: standardized Box-Cox
    transform. quantile: place among the quantiles, in [-1, 1]. enum: one-hot over the seen values and, last, any other
    one; a missing value sets none. All features of one type are handled together. After them come the presence bits: 1
    where a feature of `spec.presence` is there, else 0.
    """

    def __init__(self, spec: NormalizationSpec) -> None:
        super().__init__()
        by_type: dict[str, list[int]] = {}
        by_name = {feature.name: feature for feature in spec.features}
        for i, name in enumerate(spec.inputs):
            if name in by_name:
                by_type.setdefault(by_name[name].type, []).append(i)
        self.types = sorted(by_type)
        self.output_columns: list[tuple[str, str]] = []
        """What each column of the output is: a feature, and of it `value`, `presence`, `value <v>` or `other value`."""
        self.outputs = 0
        for type_ in self.types:
            members = [by_name[spec.inputs[i]] for i in by_type[type_]]
            self._keep(f"{type_}_columns", torch.tensor(by_type[type_]))
            self.outputs += getattr(self, f"_init_{type_}", self._init_standard)(type_, members)
            for member in members:
                of = [f"value {v:g}" for v in member.values] + ["other value"] if type_ == "enum" else ["value"]
                self.output_columns += [(member.name, what) for what in of]
        self._keep("presence_columns", torch.tensor([spec.inputs.index(n) for n in spec.presence], dtype=torch.int64))
        self.output_columns += [(name, "presence") for name in spec.presence]
        self.outputs += len(spec.presence)

    @property
    def output_features(self) -> list[str]:
        """The feature that each column of the output comes from."""
        return [name for name, _ in self.output_columns]

    @property
    def device(self) -> torch.device:
        return self.get_buffer("presence_columns").device

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value)

    def _init_standard(self, type_: str, members: list[FeatureNormalization]) -> int:
        self._keep(f"{type_}_mean", torch.tensor([f.mean for f in members]))
        self._keep(f"{type_}_stddev", torch.tensor([max(f.stddev, 1e-30) if f.stddev else 1.0 for f in members]))
        return len(members)

    def _init_probability(self, type_: str, members: list[FeatureNormalization]) -> int:
        clamps = torch.tensor([f.probability_clamp for f in members])
        self.register_buffer("probability_clamp", clamps, persistent=False)
        return self._init_standard(type_, members)

    def _init_box_cox(self, type_: str, members: list[FeatureNormalization]) -> int:
        self._keep("box_cox_lambda", torch.tensor([f.box_cox_lambda for f in members]))
        self._keep("box_cox_floor", torch.tensor([f.box_cox_floor for f in members], dtype=torch.float64))
        self._keep("box_cox_shift", torch.tensor([f.box_cox_shift for f in members], dtype=torch.float64))
        return self._init_standard(type_, members)

    def _init_quantile(self, _: str, members: list[FeatureNormalization]) -> int:
        # Shorter lists are filled with infinity, which no finite value reaches.
        width = max(len(f.quantiles) for f in members)
        rows = [f.quantiles + [float("inf")] * (width - len(f.quantiles)) for f in members]
        self._keep("quantile_edges", torch.tensor(rows))
        self._keep("quantile_last", torch.tensor([float(len(f.quantiles) - 1) for f in members]))
        return len(members)

    def _init_enum(self, _: str, members: list[FeatureNormalization]) -> int:
        width = max(len(f.values) for f in members)
        rows = [f.values + [float("nan")] * (width - len(f.values)) for f in members]
        # The last place is that of any other value.
        used = torch.tensor([[i < len(f.values) or i == width for i in range(width + 1)] for f in members])
        self._keep("enum_values", torch.tensor(rows))
        self._keep("enum_used", used.flatten().nonzero().squeeze(1))
        return int(used.sum())

    def forward(self, raw: Tensor) -> Tensor:
        """Raw features, float32 [batch, inputs], NaN = missing -> float32 [batch, outputs], all finite."""
        parts = []
        for type_ in self.types:
            x = raw.index_select(1, self.get_buffer(f"{type_}_columns"))
            missing = torch.isnan(x)
            y = getattr(self, f"_{type_}")(torch.nan_to_num(x, nan=0.0, posinf=3e38, neginf=-3e38))
            if type_ == "enum":
                missing = missing.repeat_interleave(self.get_buffer("enum_values").shape[1] + 1, 1)
                missing = missing.index_select(1, self.get_buffer("enum_used"))
            parts.append(torch.where(missing | torch.isnan(y), torch.zeros_like(y), y))
        present = ~torch.isnan(raw.index_select(1, self.get_buffer("presence_columns")))
        return torch.cat([*parts, present.to(raw.dtype)], 1).clamp(-CLAMP, CLAMP)

    def _standardize(self, type_: str, x: Tensor) -> Tensor:
        return (x - self.get_buffer(f"{type_}_mean")) / self.get_buffer(f"{type_}_stddev")

    def _binary(self, x: Tensor) -> Tensor:
        return (x != 0).to(x.dtype)

    def _continuous(self, x: Tensor) -> Tensor:
        return self._standardize("continuous", x)

    def _probability(self, x: Tensor) -> Tensor:
        near = self.get_buffer("probability_clamp")
        p = torch.minimum(torch.maximum(x, near), 1 - near)
        return self._standardize("probability", torch.log(p / (1 - p)))

    def _box_cox(self, x: Tensor) -> Tensor:
        positive = torch.maximum(x.double() + self.get_buffer("box_cox_shift"), self.get_buffer("box_cox_floor"))
        log = torch.log(positive).float()
        lam = self.get_buffer("box_cox_lambda")
        near_zero = lam.abs() < 1e-6
        safe = torch.where(near_zero, torch.ones_like(lam), lam)
        power = torch.expm1((safe * log).clamp(-80.0, 80.0)) / safe
        return self._standardize("box_cox", torch.where(near_zero, log, power))

    def _quantile(self, x: Tensor) -> Tensor:
        edges, last = self.get_buffer("quantile_edges"), self.get_buffer("quantile_last")
        at_or_under = (x.unsqueeze(2) >= edges).to(x.dtype).sum(2)
        lower = (at_or_under - 1).clamp(min=0.0)
        lower = torch.minimum(lower, last - 1)
        index = lower.long()
        expanded = edges.unsqueeze(0).expand(x.shape[0], -1, -1)
        low = expanded.gather(2, index.unsqueeze(2)).squeeze(2)
        high = expanded.gather(2, index.unsqueeze(2) + 1).squeeze(2)
        # In float32 the width of the widest bins is infinite, and that of the narrowest none.
        width = (high.double() - low).clamp(min=1e-300)
        place = ((x.double() - low) / width).to(x.dtype).clamp(0.0, 1.0)
        return 2 * (lower + place) / last - 1

    def _enum(self, x: Tensor) -> Tensor:
        hot = torch.eq(x.unsqueeze(2), self.get_buffer("enum_values")).to(x.dtype)
        hot = torch.cat([hot, 1 - hot.sum(2, keepdim=True)], 2)
        return hot.flatten(1).index_select(1, self.get_buffer("enum_used"))
