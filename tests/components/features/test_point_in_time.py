"""State as it was known at the decision: in the log's own rows, or joined by a real Feast on a real Spark."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.features.point_in_time import REPOSITORY, join_features
from components.features.store import SERVICE
from contracts.job import JobSpec
from contracts.stage import RECORD, StageError

pytestmark = pytest.mark.usefixtures("spark")

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SPEC = JobSpec.model_validate({"actions": ["a", "b"], "data": {"features": {"ttlSeconds": 60}}})


def timeline(directory: Path, rows: list[dict[str, Any]]) -> Path:
    """A finished timeline stage with the given rows."""
    (directory / "transitions").mkdir(parents=True)
    keys = pa.schema([("mdp_id", pa.string()), ("sequence_number", pa.int64()), ("ordinal", pa.int32())])
    more = [(n, pa.string()) for n in rows[0] if n in ("action", "item", "shop")]
    states = sorted({name for row in rows for name in row if name.startswith("state_")})
    schema = pa.schema(
        [*keys, ("event_time", pa.timestamp("us", "UTC")), *more, *[(name, pa.float64()) for name in states]]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), directory / "transitions" / "part.parquet")
    (directory / RECORD).write_text("{}")
    return directory


def row(mdp: str, step: int, at: float | None = None, **more: Any) -> dict[str, Any]:
    seconds = step if at is None else at
    place = {"mdp_id": mdp, "sequence_number": step, "ordinal": step + 1}
    return place | {"event_time": NOON + timedelta(seconds=seconds)} | more


def joined(output: Path) -> list[dict[str, Any]]:
    table = pq.read_table(output / "training").sort_by([("mdp_id", "ascending"), ("ordinal", "ascending")])
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


class TestStatesOfTheLogItself:
    def test_stay_with_their_decisions_and_the_newest_go_online(self, tmp_path):
        from feast import FeatureStore

        rows = [row(f"m{m}", step, state_x=10.0 * m + step, state_y=float(step)) for m in range(5) for step in range(4)]
        rows[7].pop("state_y")
        join_features(SPEC, timeline(tmp_path / "timeline", rows), tmp_path / "out")

        found = joined(tmp_path / "out")
        assert [(r["state_x"], r["state_y"]) for r in found] == [(r["state_x"], r.get("state_y")) for r in rows]
        record = json.loads((tmp_path / "out" / RECORD).read_text())
        assert record["missing_fraction"] == {"x": 0.0, "y": 0.05}
        assert record["features"] == ["x", "y"]

        store = FeatureStore(repo_path=str(tmp_path / "out" / REPOSITORY))
        online = store.get_online_features(
            features=store.get_feature_service(SERVICE), entity_rows=[{"mdp_id": m} for m in ("m0", "m4", "no")]
        ).to_dict()
        assert online["x"] == [3.0, 43.0, None]
        assert online["y"] == [3.0, 3.0, None]

    def test_may_be_called_by_numbers(self, tmp_path):
        rows = [row("m", step, state_0=1.0 * step, state_17=-1.0) for step in range(2)]
        join_features(SPEC, timeline(tmp_path / "timeline", rows), tmp_path / "out")
        assert [(r["state_0"], r["state_17"]) for r in joined(tmp_path / "out")] == [(0.0, -1.0), (1.0, -1.0)]
        assert json.loads((tmp_path / "out" / RECORD).read_text())["features"] == ["0", "17"]

    def test_of_one_instant_are_not_mixed_up(self, tmp_path):
        rows = [row("m", 0, state_x=1.0), row("m", 1, at=0, state_x=2.0)]
        join_features(SPEC, timeline(tmp_path / "timeline", rows), tmp_path / "out")
        assert [r["state_x"] for r in joined(tmp_path / "out")] == [1.0, 2.0]

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({}, "no row of the log has state_features"),
            ({"state_user.age": 1.0}, "letters, digits and _ only"),
            ({"state_event_time": 1.0}, "'event_time' has the name of a key column"),
        ],
    )
    def test_that_cannot_be_published_are_refused(self, tmp_path, state, message):
        with pytest.raises(StageError, match=message):
            join_features(SPEC, timeline(tmp_path / "timeline", [row("m", 0, **state)]), tmp_path / "out")
        assert not (tmp_path / "out" / RECORD).exists()


USERS = [
    ("late", 1, 1.0),
    ("same", 0, 2.0),
    ("early", -59, 3.0),
    ("old", -61, 4.0),
    ("edge", -60, 7.0),
    ("two", -20, 5.0),
    ("two", -10, 6.0),
]
"""A key, the seconds from noon at which its value was stamped, and the value."""


def repository(directory: Path, offline: str = "spark", kind: str = "Float64") -> Path:
    """A Feast repository whose `shop` service has features by MDP, by item and by shop."""
    stamps = pa.timestamp("us", "UTC")
    sources = {
        "user": {
            "mdp_id": [key for key, _, _ in USERS],
            "stamp": pa.array([NOON + timedelta(seconds=s) for _, s, _ in USERS], stamps),
            "age": [value for _, _, value in USERS],
        },
        "item": {
            "item": ["a", "b"],
            "stamp": pa.array([NOON - timedelta(days=300)] * 2, stamps),
            "price": [9.5, 20.0],
        },
        "shop": {"shop": [7, 8], "stamp": pa.array([NOON - timedelta(days=1)] * 2, stamps), "open": [True, False]},
    }
    directory.mkdir()
    for name, columns in sources.items():
        pq.write_table(pa.table(columns), directory / f"{name}.parquet")
    (directory / "feature_store.yaml").write_text(
        f"project: shop\nprovider: local\nregistry: registry.db\noffline_store: {{type: {offline}}}\n"
        "online_store: {type: sqlite, path: online.db}\nentity_key_serialization_version: 3\n"
    )
    apply(directory, kind)
    return directory


def apply(directory: Path, kind: str = "Float64") -> None:
    """Register the repository's definitions, as `feast apply` does."""
    from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, types
    from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
    from feast.value_type import ValueType

    keys = {"user": ("mdp_id", ValueType.STRING), "item": ("item", ValueType.STRING), "shop": ("shop", ValueType.INT64)}
    fields = {"user": ("age", getattr(types, kind)), "item": ("price", types.Float64), "shop": ("open", types.Bool)}
    ttl = {"user": timedelta(seconds=60), "item": timedelta(0), "shop": timedelta(days=7)}
    entities = {name: Entity(name=name, join_keys=[key], value_type=type_) for name, (key, type_) in keys.items()}
    views = [
        FeatureView(
            name=name, entities=[entities[name]], ttl=ttl[name],
            schema=[Field(name=fields[name][0], dtype=fields[name][1])],
            source=SparkSource(
                name=name, path=str(directory / f"{name}.parquet"), file_format="parquet", timestamp_field="stamp"
            ),
        )
        for name in keys
    ]  # fmt: skip
    store = FeatureStore(repo_path=str(directory))
    store.apply([*entities.values(), *views, FeatureService(name="shop", features=views)])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tmp_path_factory.mktemp("feast") / "repository")


def named(path: Path, **changes: Any) -> JobSpec:
    settings = {"repository": str(path), "service": "shop", "keys": ["shop"], "actionKey": "item"} | changes
    return JobSpec.model_validate({"actions": ["a", "b"], "data": {"features": settings}})


# A whole number that has been beside missing ones is written with a fraction by some tools.
DECISIONS = [
    row(mdp, 0, action="a", shop="7.0" if mdp == "same" else "7")
    for mdp in ("late", "same", "early", "old", "edge", "two", "unknown")
]


class TestStatesOfANamedService:
    @pytest.fixture(scope="class")
    def output(self, shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("named")
        more = [row("two", 1, at=5, action="b", shop="8"), row("nowhere", 0, action="b", shop="9")]
        join_features(named(shop), timeline(root / "timeline", [*DECISIONS, *more]), root / "out")
        return root / "out"

    def test_a_later_value_is_never_used_one_of_the_same_instant_is_and_an_old_one_is_missing(self, output):
        found = {r["mdp_id"]: r["state_age"] for r in joined(output) if r["ordinal"] == 1}
        assert found == {
            "late": None, "same": 2.0, "early": 3.0, "old": None, "edge": 7.0, "two": 6.0, "unknown": None,
            "nowhere": None,
        }  # fmt: skip

    def test_other_keys_of_the_log_join_too(self, output):
        found = {(r["mdp_id"], r["ordinal"]): r["state_open"] for r in joined(output)}
        assert (found["same", 1], found["two", 2], found["nowhere", 1]) == (1.0, 0.0, None)

    def test_the_action_joins_what_describes_it(self, output):
        assert {(r["action"], r["action_feature_price"]) for r in joined(output)} == {("a", 9.5), ("b", 20.0)}
        record = json.loads((output / RECORD).read_text())
        assert record["features"] == ["age", "open"]
        assert record["action_features"] == ["price"]

    def test_no_row_is_lost_and_mdps_stay_in_order(self, output):
        found = joined(output)
        assert len(found) == 9
        assert [r["ordinal"] for r in found if r["mdp_id"] == "two"] == [1, 2]


def test_keys_that_read_alike_one_after_another_are_not_mixed_up(tmp_path, monkeypatch):
    """(1, 23) and (12, 3) at one instant, a third pair that no view knows, and rows without one of the keys."""
    from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, types
    from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
    from feast.value_type import ValueType

    path = tmp_path / "repository"
    repository(path)
    stamp = pa.array([NOON - timedelta(seconds=s) for s in (20, 10)], pa.timestamp("us", "UTC"))
    visits = {"mdp_id": ["1", "12"], "shop": [23, 3], "stamp": stamp, "visits": [4.0, 5.0]}
    pq.write_table(pa.table(visits), path / "visits.parquet")
    user = Entity(name="user", join_keys=["mdp_id"], value_type=ValueType.STRING)
    shop = Entity(name="shop", join_keys=["shop"], value_type=ValueType.INT64)
    source = SparkSource(
        name="visits", path=str(path / "visits.parquet"), file_format="parquet", timestamp_field="stamp"
    )
    fields = [Field(name="visits", dtype=types.Float64)]
    view = FeatureView(name="visits", entities=[user, shop], ttl=timedelta(days=1), schema=fields, source=source)
    FeatureStore(repo_path=str(path)).apply([user, shop, view, FeatureService(name="visited", features=[view])])
    rows = [
        row(mdp, 0, action="a", shop=shop)
        for mdp, shop in (("1", "23"), ("12", "3"), ("123", "9"), ("x", None), ("y", None))
    ]
    turns, asked = [], FeatureStore.get_historical_features
    monkeypatch.setattr(FeatureStore, "get_historical_features", lambda *a, **k: (turns.append(1), asked(*a, **k))[1])
    spec = named(path, service="visited", actionKey=None)
    join_features(spec, timeline(tmp_path / "timeline", rows), tmp_path / "out")
    found = {r["mdp_id"]: r["state_visits"] for r in joined(tmp_path / "out")}
    assert found == {"1": 4.0, "12": 5.0, "123": None, "x": None, "y": None}
    assert len(turns) == 2


def test_numbers_that_describe_an_action_become_its_features(tmp_path):
    spec = JobSpec.model_validate({"actionSpace": "parametric"})
    rows = [row("m", i, state_x=float(i)) for i in range(3)]
    directory = timeline(tmp_path / "timeline", rows)
    numbers = pa.map_(pa.string(), pa.float64())
    actions = pa.array([[("price", 9.0)], [("price", 5.0), ("blue", 1.0)], []], numbers)
    # What nobody took yet is described by something more.
    lists = pa.array([[[("price", 9.0)], [("price", 2.0), ("size", 3.0)]], None, []], pa.list_(numbers))
    file = directory / "transitions" / "part.parquet"
    table = pq.read_table(file).append_column("action", actions).append_column("possible_actions", lists)
    pq.write_table(table, file)
    join_features(spec, directory, tmp_path / "out")
    found = [(r["action_feature_price"], r["action_feature_blue"]) for r in joined(tmp_path / "out")]
    assert found == [(9.0, None), (5.0, 1.0), (None, None)]
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (record["features"], record["action_features"]) == (["x"], ["blue", "price", "size"])


def test_the_items_of_a_list_become_a_slates_features(tmp_path):
    spec = JobSpec.model_validate({"actionSpace": "slate", "slate": {"size": 1}})
    directory = timeline(tmp_path / "timeline", [row("m", i, state_x=float(i)) for i in range(40)])
    numbers = pa.list_(pa.map_(pa.string(), pa.float64()))
    shown, listed = [[("price", 1.0)]], [[("price", 1.0)], [("price", 2.0), ("blue", 1.0)]]
    file = directory / "transitions" / "part.parquet"
    table = pq.read_table(file).append_column("action", pa.array([shown] * 40, numbers))
    pq.write_table(table.append_column("possible_actions", pa.array([listed] * 40, numbers)), file)
    join_features(spec, directory, tmp_path / "out")
    found = Counter((r["action_feature_price"], r["action_feature_blue"]) for r in joined(tmp_path / "out"))
    assert found.keys() == {(1.0, None), (2.0, 1.0)}
    assert min(found.values()) > 8


def test_the_online_store_goes_on_from_where_it_was(shop: Path, tmp_path: Path) -> None:
    """Twice the same days, then a later one: only what is new is written, and nothing is taken back."""
    from feast import FeatureStore

    path = repository(tmp_path / "repository")
    materialized = []
    for name, second in (("first", 0), ("again", 0), ("later", 3)):
        rows = [row("late", 0, at=second, action="a", shop="7")]
        join_features(named(path), timeline(tmp_path / name, rows), tmp_path / f"out-{name}")
        materialized.append(json.loads((tmp_path / f"out-{name}" / RECORD).read_text())["materialized"])
        store = FeatureStore(repo_path=str(path))
        ages = store.get_online_features(
            features=["user:age"], entity_rows=[{"mdp_id": "late"}, {"mdp_id": "two"}]
        ).to_dict()["age"]
        assert ages == [1.0 if second else None, 6.0]
    assert materialized == [["user", "item", "shop"], [], ["user", "item", "shop"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"service": "shopping"}, r"service shopping: not in the registry.*there are: shop"),
        ({"keys": []}, r"view shop is joined by shop, which is neither mdp_id nor among data\.features\.keys"),
        ({"repository": "/nowhere"}, "no feature_store.yaml there"),
    ],
)
def test_a_service_that_cannot_be_joined_is_refused(shop, tmp_path, changes, message):
    with pytest.raises(StageError, match=message):
        join_features(named(shop, **changes), timeline(tmp_path / "timeline", DECISIONS), tmp_path / "out")


def test_features_that_are_no_numbers_are_refused(tmp_path):
    path = repository(tmp_path / "repository", kind="String")
    with pytest.raises(StageError, match=r"user\.age is a String; a policy learns from numbers"):
        join_features(named(path), timeline(tmp_path / "timeline", DECISIONS), tmp_path / "out")


def test_a_repository_on_another_engine_is_refused(tmp_path):
    path = repository(tmp_path / "repository", offline="file")
    with pytest.raises(StageError, match="its offline_store is file"):
        join_features(named(path), timeline(tmp_path / "timeline", DECISIONS), tmp_path / "out")


@pytest.mark.parametrize("settings", [{"repository": "r"}, {"service": "s"}, {"keys": ["shop"]}, {"actionKey": "item"}])
def test_settings_that_make_no_sense_alone(settings):
    with pytest.raises(ValueError, match="service"):
        JobSpec.model_validate({"actions": ["a", "b"], "data": {"features": settings}})
