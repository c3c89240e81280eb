"""Each type of feature is recognized in a sample of it, and the sample is brought to unit scale."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from components.normalization.explain import explain
from components.normalization.graph import CLAMP, NormalizationGraph
from components.normalization.identify import as_seen, box_cox, examine, identify, identify_features, normality
from components.normalization.spec import FeatureNormalization, NormalizationSpec
from contracts.job import JobSpec, Normalization
from contracts.stage import StageError, read_record, stage

LIMITS = Normalization()
N = 20_000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features stage's directory, with features of all sorts."""
    root = tmp_path_factory.mktemp("features")
    columns = {
        "speed": rng().normal(3, 2, 500),
        "flag": rng().integers(0, 2, 500).astype(float),
        "holed": np.where(rng().random(500) < 0.2, np.nan, rng().normal(0, 1, 500)),
        "constant": np.full(500, 4.0),
        "half_constant": np.where(rng().random(500) < 0.5, np.nan, 4.0),
        "zero": np.where(rng().random(500) < 0.5, np.nan, 0.0),
        "never": np.full(500, np.nan),
        "rare": np.where(np.arange(500) < 2, np.arange(500.0), np.nan),
    }
    with stage("features", root / "all") as (directory, facts):
        table = pa.table({f"state_{n}": pa.array(v, pa.float64(), from_pandas=True) for n, v in columns.items()})
        (directory / "training").mkdir()
        pq.write_table(table, directory / "training" / "part.parquet")
        facts["features"] = list(columns)
    return root / "all"


@pytest.fixture(scope="module")
def identified(written: Path) -> NormalizationSpec:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_MASTER", "local[1]")
        identify_features(job(overrides={"flag": "enum"}, maxMissingFraction=0.99), written, written.parent / "out")
    assert read_record(written.parent / "out")["types"]["speed"] == "continuous"
    return NormalizationSpec.read(written.parent / "out" / "spec.json")


def job(**normalization: object) -> JobSpec:
    return JobSpec.model_validate({"actions": ["a", "b"], "normalization": normalization})


class TestTheStage:
    def test_features_that_carry_nothing_are_dropped_with_the_reason(self, identified: NormalizationSpec) -> None:
        assert identified.dropped == {
            "constant": "constant at 4",
            "zero": "constant at 0",
            "never": "never present",
            "rare": "missing in 99.6000% of the rows",
        }

    def test_the_others_are_identified_or_set_by_hand(self, identified: NormalizationSpec) -> None:
        types = {f.name: f.type for f in identified.features}
        assert types == {"speed": "continuous", "flag": "enum", "holed": "continuous", "half_constant": "binary"}

    def test_of_one_with_a_single_value_the_network_is_told_whether_it_is_there(
        self, identified: NormalizationSpec
    ) -> None:
        half = next(f for f in identified.features if f.name == "half_constant")
        assert half.how == "always 4 where it is there: what tells is whether it is"
        rows = normalized(half.model_copy(update={"name": "x"}), np.array([4.0, np.nan]))
        assert rows.tolist() == [[1.0], [0.0]]

    def test_dropped_features_stay_inputs(self, identified: NormalizationSpec) -> None:
        kept, dropped = ["speed", "flag", "holed", "half_constant"], ["constant", "zero", "never", "rare"]
        assert sorted(identified.inputs) == sorted(kept + dropped)

    def test_present_and_missing_values_are_counted(self, identified: NormalizationSpec) -> None:
        holed = next(f for f in identified.features if f.name == "holed")
        assert holed.evidence["count"] + holed.evidence["missing"] == 500
        assert 50 < holed.evidence["missing"] < 150

    def test_an_override_of_no_feature_is_refused(
        self, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SPARK_MASTER", "local[1]")
        with pytest.raises(StageError, match=r"normalization\.overrides\.sped: no such feature; there are speed, flag"):
            identify_features(job(overrides={"sped": "enum"}), written, tmp_path / "out")


@pytest.mark.parametrize("missing", [False, True])
def test_items_told_apart_by_which_features_they_have_keep_them_and_those_all_alike_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    """A one-hot description, of which logs may leave out the zeros, as ReAgent's do."""
    monkeypatch.setenv("SPARK_MASTER", "local[1]")
    first = rng().random(300) < 0.5
    with stage("features", tmp_path / "features") as (directory, facts):
        values = {"state_age": rng().normal(40, 9, 300)}
        values |= {f"action_feature_{i}": np.where(first == i, np.nan if missing else 1.0, 1.0) for i in (0, 1)}
        (directory / "training").mkdir()
        table = pa.table({n: pa.array(v, pa.float64(), from_pandas=True) for n, v in values.items()})
        pq.write_table(table, directory / "training" / "part.parquet")
        facts |= {"features": ["age"], "action_features": ["0", "1"]}
    spec = JobSpec.model_validate({"actionSpace": "parametric"})
    if not missing:
        with pytest.raises(StageError, match=r"no feature of the actions carries information: .*constant at 1"):
            identify_features(spec, tmp_path / "features", tmp_path / "out")
        return
    identify_features(spec, tmp_path / "features", tmp_path / "out")
    found = NormalizationSpec.read(tmp_path / "out" / "action_spec.json")
    assert [f.name for f in found.features] == ["0", "1"]
    items = NormalizationGraph(found)(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]))
    assert not torch.equal(items[0], items[1])


@pytest.mark.parametrize(("missing", "found"), [(0, str), (5, str), (500, FeatureNormalization)])
def test_a_constant_that_is_seldom_missing_is_one(missing: int, found: type) -> None:
    summary = {"count": 10_000 - missing, "missing": missing, "minimum": 4.0, "maximum": 4.0}
    assert isinstance(examine("x", np.full(50, 4.0), summary, Normalization(maxMissingFraction=1), None), found)


def test_features_of_the_state_and_of_the_action_have_a_spec_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARK_MASTER", "local[1]")
    with stage("features", tmp_path / "features") as (directory, facts):
        values = {"state_age": rng().normal(40, 9, 300), "action_feature_price": rng().integers(0, 3, 300) * 1.0}
        values["action_feature_price"][::3] = np.nan
        (directory / "training").mkdir()
        table = pa.table({n: pa.array(v, pa.float64(), from_pandas=True) for n, v in values.items()})
        pq.write_table(table, directory / "training" / "part.parquet")
        facts |= {"features": ["age"], "action_features": ["price"]}
    spec = job(presence=True, overrides={"action_feature_price": "enum"})
    identify_features(spec, tmp_path / "features", tmp_path / "out")
    specs = [NormalizationSpec.read(tmp_path / "out" / name) for name in ("spec.json", "action_spec.json")]
    assert [s.inputs for s in specs] == [["age"], ["price"]]
    assert [s.features[0].type for s in specs] == ["continuous", "enum"]
    assert [s.presence for s in specs] == [[], ["price"]]
    assert explain(tmp_path / "features", tmp_path / "out", "action_feature_price")["type"] == "enum"
    assert read_record(tmp_path / "out")["types"] == {"age": "continuous", "action_feature_price": "enum"}


class TestASample:
    """Of 5,000 rows 1,000 are looked at; what they do not show, the counts over all rows do."""

    @pytest.fixture(scope="class")
    def columns(self) -> dict[str, np.ndarray]:
        n = 5000
        rare = (np.arange(n) == 4321) * 1.0
        return {
            "flag_with_seven": np.where(rare, 7.0, rng().integers(0, 2, n)),
            "fraud": rare,
            "share_to_250": np.where(rare, 250.0, rng().beta(2, 5, n)),
            "rank": rng().integers(-3, 3, n) * 1.0,
            "rank_and_more": np.where(rng().random(n) < 0.004, rng().integers(50, 90, n), rng().integers(0, 5, n)),
        }

    @pytest.fixture(scope="class")
    def spec(self, columns: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> NormalizationSpec:
        root, n = tmp_path_factory.mktemp("sample"), 5000
        with stage("features", root / "features") as (directory, facts):
            (directory / "training").mkdir()
            keys = {"mdp_id": [f"m{i // 7}" for i in range(n)], "ordinal": [i % 7 + 1 for i in range(n)]}
            table = pa.table(keys | {f"state_{name}": values.astype(float) for name, values in columns.items()})
            pq.write_table(table, directory / "training" / "part.parquet")
            facts["features"] = list(columns)
        with stage("features", root / "split") as (directory, facts):
            (directory / "training").mkdir()
            for i, part in enumerate((table.slice(4000), table.slice(0, 300), table.slice(300, 3700))):
                pq.write_table(part, directory / "training" / f"{i}.parquet")
            facts["features"] = list(columns)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPARK_MASTER", "local[2]")
            identify_features(job(sampleRows=1000), root / "features", root / "out")
            text = (root / "out" / "spec.json").read_text()
            patch.setenv("SPARK_MASTER", "local[1]")
            patch.setattr("components.normalization.identify.TOGETHER", 2)
            identify_features(job(sampleRows=1000), root / "split", root / "again")
        assert (root / "again" / "spec.json").read_text() == text, "wherever rows are, however many columns at once"
        return NormalizationSpec.model_validate_json(text)

    def test_is_not_taken_for_all_there_is(self, spec: NormalizationSpec) -> None:
        types = {f.name: f.type for f in spec.features}
        assert types["flag_with_seven"] == "enum"
        assert types["share_to_250"] != "probability"
        assert types["rank"] == "enum"
        assert types["rank_and_more"] not in ("enum", "binary"), "it has over forty values"

    def test_tells_how_many_values_all_rows_have(self, spec: NormalizationSpec, columns: dict[str, np.ndarray]) -> None:
        counts = {name: len(np.unique(column)) for name, column in columns.items()}
        found = {f.name: f.evidence["distinct"] for f in spec.features}
        for name in ("flag_with_seven", "fraud", "rank"):
            assert found[name] == counts[name]
        assert counts["rank_and_more"] > 15
        assert found["rank_and_more"] == pytest.approx(counts["rank_and_more"], abs=1)

    def test_leaves_no_rare_feature_out(self, spec: NormalizationSpec) -> None:
        fraud = next(f for f in spec.features if f.name == "fraud")
        assert fraud.type == "binary"
        assert (fraud.evidence["minimum"], fraud.evidence["maximum"]) == (0, 1)


def test_values_that_a_network_cannot_tell_apart_are_one() -> None:
    dates = as_seen(np.repeat([20240131.0, 20240132.0, 20240201.0], 50))
    feature = found(dates)
    assert feature.values == sorted(set(dates))
    rows = normalized(feature, np.array([20240131.0, 20240201.0, 5.0]))
    assert (rows.sum(1) == 1).all()
    assert (rows >= 0).all()


def test_box_cox_must_do_more_than_the_job_s_margin() -> None:
    values = rng().lognormal(0, 1, N)
    evidence: dict[str, float] = {}
    assert identify("x", values, evidence, Normalization()).type == "box_cox"
    assert identify("x", values, evidence, Normalization(boxCoxLambdaMargin=1.5)).type == "quantile"


def test_tiny_shares_are_no_probabilities() -> None:
    for values in (rng().lognormal(np.log(2e-6), 1, N), rng().uniform(1, 5, N) * 3e-6):
        feature = found(values)
        assert feature.type != "probability"
        assert len(np.unique(normalized(feature, values))) > N / 4


def test_box_cox_works_in_the_features_own_unit() -> None:
    values = rng().lognormal(0, 1, N) * 1e-13
    result = normalized(found(values, "box_cox"), values)
    assert result.std() == pytest.approx(1, abs=0.1)


def test_an_enum_of_too_many_values_is_refused() -> None:
    with pytest.raises(StageError, match=r"normalization\.overrides\.x: 20,000 distinct values are too many"):
        found(rng().normal(size=N), "enum")


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def bimodal(scale: float = 1.0) -> np.ndarray:
    """Far from normal in a way that no Box-Cox transform mends, and symmetric about 0."""
    return np.concatenate([rng().normal(-5, 1, N // 2), rng().normal(5, 1, N // 2)]) * scale


def found(values: np.ndarray, override: str | None = None, limits: Normalization = LIMITS) -> FeatureNormalization:
    return identify("x", values, {"count": float(len(values)), "missing": 3.0}, limits, override)


def normalized(feature: FeatureNormalization, values: np.ndarray) -> np.ndarray:
    graph = NormalizationGraph(NormalizationSpec(inputs=["x"], features=[feature]))
    return graph(torch.from_numpy(values.astype(np.float32)[:, None])).numpy()


@pytest.mark.parametrize(
    ("values", "type_"),
    [
        (rng().integers(0, 2, N), "binary"),
        (rng().integers(0, 5, N), "enum"),
        (rng().integers(1, 3, N), "enum"),
        (-rng().integers(0, 4, N), "enum"),
        (rng().choice([-100.0, 0.0, 7.0], N), "enum"),
        (rng().beta(2, 5, N), "probability"),
        (rng().choice([0.0, 0.5, 1.0], N), "probability"),
        (rng().normal(3, 2, N), "continuous"),
        (rng().normal(0, 1e-3, N), "continuous"),
        (rng().normal(-1e6, 10, N), "continuous"),
        (rng().lognormal(2, 1, N), "box_cox"),
        (rng().lognormal(0, 1, N) * 1e-3 - 1.0, "box_cox"),
        (-(rng().lognormal(2, 0.2, N) ** -4), "quantile"),
        (bimodal(), "quantile"),
        (rng().integers(0, 11, N), "quantile"),
        (rng().binomial(40, 0.5, N), "continuous"),
    ],
)
def test_a_type_is_recognized(values: np.ndarray, type_: str) -> None:
    feature = found(values.astype(np.float64))
    assert feature.type == type_, feature.how
    assert feature.how


def test_an_integer_with_more_values_than_an_enum_may_have_is_no_enum() -> None:
    values = rng().integers(0, 10, N).astype(np.float64)
    assert found(values).type == "enum"
    assert found(values, limits=Normalization(maxEnumValues=9)).type != "enum"


def test_the_evidence_is_what_the_sample_shows() -> None:
    values = rng().lognormal(2, 1, N)
    evidence = found(values).evidence
    assert evidence["count"] == N
    assert evidence["missing"] == 3
    assert evidence["minimum"] == values.min()
    assert evidence["maximum"] == values.max()
    assert evidence["mean"] == pytest.approx(values.mean())
    assert evidence["stddev"] == pytest.approx(values.std())
    assert evidence["skewness"] == pytest.approx(stats.skew(values))
    assert evidence["k2"] == pytest.approx(stats.normaltest(values).statistic)


def test_the_reason_names_the_figures_that_decided() -> None:
    assert "is under 1000" in found(rng().normal(size=N)).how
    assert "lambda" in found(rng().lognormal(2, 1, N)).how
    assert "5 distinct integers" in found(rng().integers(0, 5, N).astype(float)).how


@pytest.mark.parametrize(
    "values",
    [
        rng().normal(3, 2, N),
        rng().normal(0, 1e-3, N),
        rng().normal(1e3, 1, N),
        rng().lognormal(2, 1, N),
        rng().lognormal(0, 1, N) * 1e-3 - 1.0,
        rng().beta(2, 5, N),
        rng().normal(0.5, 1e-3, N),
    ],
)
def test_a_scaled_feature_has_mean_zero_and_unit_variance(values: np.ndarray) -> None:
    feature = found(values)
    assert feature.type in ("continuous", "box_cox", "probability")
    result = normalized(feature, values)
    assert result.mean() == pytest.approx(0, abs=0.03)
    assert result.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_a_feature_by_quantiles_spreads_evenly_whatever_its_scale(scale: float) -> None:
    values = bimodal(scale)
    result = normalized(found(values), values)[:, 0]
    assert np.histogram(result, 10, (-1, 1))[0] / N == pytest.approx([0.1] * 10, abs=0.01)


def test_box_cox_makes_a_lognormal_feature_normal() -> None:
    values = rng().lognormal(2, 1, N)
    feature = found(values)
    assert feature.box_cox_lambda == pytest.approx(0, abs=0.05)
    result = normalized(feature, values)[:, 0]
    assert normality(result) < normality(values) / 100


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("binary", rng().integers(0, 3, N).astype(float)),
        ("probability", rng().normal(size=N)),
        ("continuous", rng().lognormal(2, 1, N)),
        ("box_cox", rng().normal(size=N)),
        ("quantile", rng().integers(0, 2, N).astype(float)),
        ("enum", rng().choice([0.25, 0.5], N)),
    ],
)
def test_a_type_set_by_hand_is_kept(override: str, values: np.ndarray) -> None:
    feature = found(values, override)
    assert feature.type == override
    assert feature.how == "set by hand"
    result = normalized(feature, values)
    assert np.isfinite(result).all()
    assert np.ptp(result) > 0


def test_values_that_probability_s_clamp_would_make_one_keep_a_finite_scale() -> None:
    feature = found(np.append(np.zeros(N), 1e-6))
    assert feature.type != "probability"
    assert np.isfinite(normalized(feature, np.array([0, 1e-6, 0.5, 1]))).all()


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3])
def test_a_small_positive_feature_still_tells_its_values_apart(scale: float) -> None:
    values = rng().uniform(1, 5, N) * scale
    result = normalized(found(values), values)[:, 0]
    assert len(np.unique(result)) > N / 2
    assert (np.diff(result[values.argsort()]) >= -1e-6).all()


def test_small_samples_are_taken_as_normal() -> None:
    assert normality(np.array([1.5, 2.5, 100.0])) == 0
    assert found(np.array([1.5, -2.5, 100.0])).type == "continuous"


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e9])
def test_box_cox_of_a_feature_does_not_depend_on_its_unit(scale: float) -> None:
    values = (rng().lognormal(0, 1, N) - 1) * scale
    feature = found(values, "box_cox")
    result = normalized(feature, values)[:, 0]
    assert result.std() == pytest.approx(1, abs=0.05)
    assert (np.abs(result) < CLAMP).mean() > 0.999


@pytest.mark.parametrize("lam", [-0.5, 0.0, 0.5])
def test_box_cox_finds_the_exponent(lam: float) -> None:
    normal = rng().normal(10 if lam else 0, 0.5, N)
    values = np.exp(normal) if lam == 0 else normal ** (1 / lam)
    assert box_cox(values, 0.0)[0] == pytest.approx(lam, abs=0.1)


def test_box_cox_leaves_a_positive_shifted_sample() -> None:
    feature = found(rng().lognormal(2, 1, N) - 50)
    assert feature.evidence["minimum"] + feature.box_cox_shift > 0


def test_values_that_only_the_count_over_all_rows_shows_make_no_enum() -> None:
    values = np.tile([1.0, 2.0, 3.0], 100)
    assert identify("x", values, {"distinct": 3.0}, LIMITS).type == "enum"
    assert identify("x", values, {"distinct": 500.0}, LIMITS).type != "enum"
