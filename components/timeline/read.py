"""The decision log as it lies, in any of its forms, to one table with the contract's columns and types.

Nothing is lost on the way: a row brings along what it was, in `_as_it_was`, and where it cannot be read as its columns'
types, a note in `_unreadable`; both are for the quarantine.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pydantic.alias_generators import to_camel
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from contracts.decision_log import OUTCOMES_SCHEMA, schema, spark_ddl
from contracts.job import REWARD, Columns, Data, OutcomeColumns, Partition, split_paths
from contracts.stage import StageError, TransientError
from contracts.transitions import ACTION_PREFIX, NEXT_STATE_PREFIX, STATE_PREFIX

AS_IT_WAS = "_as_it_was"
"""The row as text, with columns that are not of the contract: a JSON line, or an object of the columns."""
UNREADABLE = "_unreadable"
"""Name of the first column of a row that is not of its type, or `LINE`; null in a row that can be read."""
LINE = "line"
_TORN, _TEXT, _AGAIN = "_bluewhale_torn", "_bluewhale_text", "_bluewhale_again"
"""Of a line that is none of its format, what it was; of JSON lines, all of them; of those with other than numbers where
numbers belong, the same by their text, null where there is nothing to be read again."""
DAY_MICROSECONDS = 86_400_000_000
MICROSECONDS = 1_000_000
FURTHEST = 1 << 62
"""From 0, of sequence numbers: beyond, no number holds what lies between two of them."""
EARLIEST, LATEST = datetime(1700, 1, 1, tzinfo=UTC), datetime(2260, 1, 1, tzinfo=UTC)
"""Of event times, which Feast counts in nanoseconds since 1970."""
FIRST_MICROSECOND, LAST_MICROSECOND = (int(time.timestamp()) * MICROSECONDS for time in (EARLIEST, LATEST))
HEAD_ROWS = 1000
FRACTIONS = 1 / 3
"""Of the first numbers: fewer are a mistake, and more a unit in which no step is whole."""
NO_CONNECTOR = ("ClassNotFoundException", "No FileSystem for scheme")
REQUIRED = ("mdp_id", "sequence_number", "action")
SUFFIXES = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".orc": "orc", ".parquet": "parquet"}
OURS = (
    "ordinal", "time_diff", "next_action", "possible_next_actions", "terminal", "returns", "reward_timeline",
    "before_its_time", "overruled", "values", "odd", "tie", "unknown", "row", "state", "first", "bad", "step", "steps",
    "left_out",
)  # fmt: skip
OUR_PREFIXES = (STATE_PREFIX, NEXT_STATE_PREFIX, ACTION_PREFIX, "returns_", "quarantine_", "_")
"""Names that the stage gives to columns, so that a join key of the log cannot have them."""
_STRINGS = T.MapType(T.StringType(), T.StringType())
_NAMED_TEXTS = _STRINGS.simpleString()


def read_log(spark: SparkSession, path: str, data: Data | None = None, action_space: str = "discrete") -> DataFrame:
    """The decision log at `path` (several, separated by commas) with the contract's columns and those two notes.

    JSON lines, CSV (maps and arrays as JSON in a cell), Parquet, ORC and tables are read; `data` gives the format where
    suffixes do not tell it, the names of the columns where they are others, and the partitions to read. A sequence
    number may be a whole number, a time (microseconds then) or a number with a fraction, as seconds since 1970 have one
    (millionths then); a log without event times is given some from its partition and sequence numbers, since only
    their order is needed. A bare `reward` column is taken as the metric `reward`; features and metrics may be null. The
    join keys that the job names for its feature service, and `ds`, come along as they are.
    Raises `StageError` for a path that is not there, a column that is missing, and files that cannot be read together.
    """
    data = data or Data()
    wanted = spark_schema(schema(action_space))
    names = _names(data.columns, wanted)
    others = [names[REWARD], "ds", *data.state_columns, *data.features.keys]
    if data.partition:
        others.append(data.partition.column)
    raw = _load(spark, path, data.format, "data.decisionLog", _json_schema(names, wanted, others))
    if data.partition:
        name = data.partition.column
        if name not in (there := _there(raw, [name])):
            raise StageError(f"data.partition.column {name}: no such column in {path}; found {_found(there)}")
        raw = raw.where(_within(data.partition))
    wished = _wished(data.columns, names, REQUIRED)
    told = [names["truncated"]] if data.last_step == "column" and not data.outcomes else []
    there = _there(raw, [*wished.values(), *told, *data.state_columns, *data.features.keys])
    known = _known(names, there, wished, data.columns, f"data.decisionLog {path}", "data.columns")
    if missing := [name for name in data.state_columns if name not in there]:
        raise StageError(f"data.stateColumns: {missing[0]} is missing from {path}; found {_found(there)}")
    if missing := [name for name in data.features.keys if name not in there]:
        raise StageError(f"data.features.keys: {missing[0]} is missing from {path}; found {_found(there)}")
    taken = {*wanted.names, *OURS}
    if clash := [k for k in data.features.keys if k in taken or k.startswith(OUR_PREFIXES)]:
        raise StageError(f"data.features.keys: {clash[0]} is the name of a column of ours; rename the join key")
    # `isEmpty` would look into every file.
    if "event_time" in known and not raw.where(F.col(f"`{known['event_time']}`").isNotNull()).select(F.lit(1)).take(1):
        del known["event_time"]
    if "event_time" not in known:
        say = f"{path} has no event times to count from; name their column in data.columns.eventTime"
        if data.outcome_wait_seconds is not None:
            raise StageError(f"data.outcomeWaitSeconds: {say}, or use all outcomes")
        if data.features.service:
            raise StageError(f"data.features.service: {say}, or log the state")
    # A JSON line may leave out what is false.
    if data.last_step == "column" and "truncated" not in known and not data.outcomes and _TEXT not in raw.columns:
        raise StageError(
            f"data.lastStep column: {path} has no column {names['truncated']} to tell of last steps; name it "
            f"in data.columns.truncated, or say terminal or truncated; found {_found(there)}"
        )
    if data.state_columns:
        known.pop("state_features", None)
    return _conform(raw, known, wanted, data, in_millionths=_has_fractions(raw, known["sequence_number"]))


def _within(partition: Partition) -> Column:
    """Whether a row is of the partitions that are to be read; one that does not tell its own is read, and rejected."""
    value, last = F.col(f"`{partition.column}`").cast("string"), partition.last
    within = value.isNull() | value.between(partition.first, last)
    # All hours of the last day.
    separators = " T-" if re.fullmatch(r"\d{4}-\d\d-\d\d", last) else ""
    return functools.reduce(lambda either, one: either | value.startswith(last + one), separators, within)


def counted_in_millionths(log: DataFrame) -> bool:
    """Whether the log's sequence numbers had fractions."""
    return bool(log.schema["sequence_number"].metadata)


def read_outcomes(spark: SparkSession, path: str, data: Data | None = None, in_millionths: bool = False) -> DataFrame:
    """The outcomes at `path`, in any of the log's formats, with their contract's columns and the same two notes.

    Their sequence numbers are read as the log's are. Raises `StageError` as `read_log` does.
    """
    data = data or Data()
    wanted = spark_schema(OUTCOMES_SCHEMA)
    names = _names(data.outcome_columns, wanted)
    raw = _load(spark, path, data.outcome_format, "data.outcomes", _json_schema(names, wanted, [names[REWARD]]))
    wished = _wished(data.outcome_columns, names, ("mdp_id", "sequence_number"))
    there = _there(raw, [*wished.values()])
    known = _known(names, there, wished, data.outcome_columns, f"data.outcomes {path}", "data.outcomeColumns")
    return _conform(raw, known, wanted, Data(), in_millionths)


def _names(columns: Columns | OutcomeColumns, wanted: T.StructType) -> dict[str, str]:
    """Their own names of the contract's columns."""
    return {name: getattr(columns, name) or name for name in (*wanted.names, REWARD)}


def _wished(columns: Columns | OutcomeColumns, names: dict[str, str], required: Sequence[str]) -> dict[str, str]:
    """Those of the names that must be there: of the `required` columns, and of those that the job names itself."""
    return {ours: theirs for ours, theirs in names.items() if ours in required or getattr(columns, ours)}


def _known(
    names: dict[str, str],
    there: list[str],
    wished: dict[str, str],
    columns: Columns | OutcomeColumns,
    whose: str,
    field: str,
) -> dict[str, str]:
    """Those of the names that are there."""
    for ours, theirs in wished.items():
        if theirs not in there:
            by = f" ({field}.{to_camel(ours)})" if getattr(columns, ours) else ""
            raise StageError(f"{whose}: column {theirs}{by} is missing; found {_found(there)}")
    return {ours: theirs for ours, theirs in names.items() if theirs in there}


def spark_schema(contract: pa.Schema) -> T.StructType:
    kinds = T.StructType.fromDDL(spark_ddl(contract))
    assert isinstance(kinds, T.StructType)
    return kinds


def _found(names: list[str]) -> str:
    return ", ".join(names) or "no column at all"


def _there(raw: DataFrame, asked: list[str]) -> list[str]:
    """The columns that there are; of JSON lines, whose columns we have named, not those `asked` that no line has."""
    columns = [name for name in raw.columns if name not in (_TORN, _TEXT, _AGAIN)]
    if _TEXT not in raw.columns:
        return columns
    keys = F.map_keys(F.from_json(_TEXT, _STRINGS))
    head = raw.select(keys, _TEXT).take(HEAD_ROWS)
    seen = {field.name for field in raw.schema if field.metadata}.union(*(found or [] for found, _ in head))
    if not seen and head:
        raise StageError(
            f"{head[0][1][:80]!r}: no JSON object; one is wanted in each line, whole, and no array of them"
        )
    if missing := set(asked) - seen if head else set():
        name = F.explode(keys).alias("name")
        missing -= {row[0] for row in raw.select(name).where(F.col("name").isin(list(missing))).distinct().collect()}
    return [name for name in columns if name not in missing]


def _has_fractions(raw: DataFrame, column: str) -> bool:
    """Whether the first numbers of a column say that it is not one of whole ones."""
    if isinstance(raw.schema[column].dataType, (T.IntegralType, T.DatetimeType)):
        return False
    number = F.col(f"`{column}`").try_cast("double")
    fractions = [row[0] for row in raw.select(number % 1 != 0).take(HEAD_ROWS)]
    return sum(map(bool, fractions)) > FRACTIONS * len(fractions)


def _load(spark: SparkSession, text: str, form: str, field: str, of_json: T.StructType) -> DataFrame:
    """The rows as they lie; JSON lines with the columns `of_json`."""
    paths, given = split_paths(text), form
    if form == "table":
        for name in paths:
            if not spark.catalog.tableExists(name):
                raise StageError(f"{field} {name}: no such table in Spark's catalog")
        return _union([spark.table(name) for name in paths])
    try:
        absent = next((path for path in paths if not _statuses(spark, path)), "")
        told = {path: found for path in paths if form == "auto" and (found := _form(spark, path))}
    except (PySparkException, Py4JJavaError) as error:
        said = _said(error)
        if any(words in said for words in NO_CONNECTOR):
            raise StageError(f"{field} {text}: Spark has no connector for it among its jars: {said}") from None
        raise TransientError(f"{field} {text}: it cannot be reached: {said}") from None
    if absent:
        raise StageError(f"{field} {absent}: no such file or directory")
    if form == "auto":
        form = next(iter(told.values()), "parquet")
        if other := next((path for path, found in told.items() if found != form), ""):
            raise StageError(_several(field, text, other, told[other], form))
    try:
        # Each by itself: partitions of several roots have nothing in common for Spark to find.
        whole = _union([_load_one(spark, path, form, of_json) for path in paths])
        if given == "auto":
            for file in whole.inputFiles():
                if (found := _form_of(unquote(file))) not in (form, ""):
                    raise StageError(_several(field, text, unquote(file), found, form))
        return whole
    except (PySparkException, Py4JJavaError) as error:
        raise StageError(
            f"{field} {text}: the files cannot be read together as {form}; where a column's type differs between "
            f"files, write them anew with one: {_said(error)}"
        ) from None


def _said(error: Exception) -> str:
    said = error.java_exception.getMessage() if isinstance(error, Py4JJavaError) else str(error)
    return " ".join(str(said).split())[:600]


def _several(field: str, text: str, path: str, found: str, form: str) -> str:
    return f"{field} {text}: {path} is {found}, and other files are {form}: keep one format, or write them anew in one"


def _load_one(spark: SparkSession, path: str, form: str, of_json: T.StructType) -> DataFrame:
    root = _root(spark, path)
    options = {"basePath": root} if root else {}
    if form == "json":
        return _load_json(spark, path, options, of_json)
    if form == "csv":
        return _load_csv(spark, path, options)
    return spark.read.options(**options, mergeSchema=True).format(form).load(path)


def _load_json(spark: SparkSession, path: str, options: dict[str, str], schema: T.StructType) -> DataFrame:
    """JSON lines, which are kept as well, for what they have beside the contract's columns."""
    lines = spark.read.options(**options).text(path).where(F.col("value").rlike(r"\S"))
    partitions = [name for name in lines.columns if name != "value"]
    # Maps of numbers are read as such, which is several times as fast as by their text. A line that this does not fit
    # is read again, to tell which of its values are none.
    torn = T.StructField(_TORN, T.StringType())
    others = [field for field in schema if not isinstance(field.dataType, T.StringType)]
    by_text = [T.StructField(field.name, _as_text(field.dataType)) for field in others]
    keep_torn = {"columnNameOfCorruptRecord": _TORN}
    once = lines.select(F.from_json("value", T.StructType([*schema, torn]), keep_torn).alias("read"), "*")
    unfit = F.when(F.col(f"read.{_TORN}").isNotNull(), F.col("value"))
    twice = once.select("*", F.from_json(unfit, T.StructType([*by_text, torn]), keep_torn).alias(_AGAIN))
    return twice.select(
        *[f"read.`{name}`" for name in schema.names if name not in partitions],
        *[F.col(f"`{name}`").alias(name, metadata={"partition": True}) for name in partitions],
        F.col(f"{_AGAIN}.{_TORN}").alias(_TORN),
        F.col("value").alias(_TEXT),
        F.col(_AGAIN),
    )


def _load_csv(spark: SparkSession, path: str, options: dict[str, str]) -> DataFrame:
    """CSV files with a header each; Spark by itself takes one file's header for all of them."""
    reading: dict[str, str | bool] = {
        "header": True, "escape": '"', "multiLine": True, "columnNameOfCorruptRecord": _TORN
    }  # fmt: skip
    whole = spark.read.options(**reading, **options).csv(path)
    by_header: dict[tuple[str, ...], list[str]] = {}
    for file in map(unquote, whole.inputFiles()):
        by_header.setdefault(tuple(spark.read.options(**reading).csv(file).columns), []).append(file)
    below = [part for files in by_header.values() for part in files[0].split("/") if options and "=" in part]
    partitions = {part.split("=")[0] for part in below}

    def cells(names: tuple[str, ...]) -> T.StructType:
        # A line with more cells than the header, or fewer, is told only by a schema that has a place for it; and a
        # partition's column is not looked for in the file, where it may be too.
        inside = [f"{name}_in_file" if name in partitions else name for name in names]
        return T.StructType([T.StructField(name, T.StringType()) for name in [*inside, _TORN]])

    frames = [
        spark.read.options(**reading, **options).schema(cells(names)).csv(files)
        for names, files in by_header.items()
        if names
    ]
    return _union(frames or [whole])


def _union(frames: list[DataFrame]) -> DataFrame:
    """The rows of all. What is text in one is text in all: Spark would make it the numbers or times of the others."""
    found: dict[str, set[str]] = {}
    for name, kind in (pair for frame in frames for pair in frame.dtypes):
        found.setdefault(name, set()).add(kind)
    shapes = {name: {kind.partition("<")[0] for kind in kinds} for name, kinds in found.items() if len(kinds) > 1}
    texts = {name: "string" for name, of in shapes.items() if "string" in of and not of & {"struct", "array", "map"}}
    texts |= {name: _NAMED_TEXTS for name, of in shapes.items() if of == {"map"} and _NAMED_TEXTS in found[name]}

    def read_alike(frame: DataFrame) -> DataFrame:
        columns = [
            F.col(f"`{field.name}`").cast(texts[field.name]).alias(field.name, metadata=field.metadata)
            if field.name in texts
            else F.col(f"`{field.name}`")
            for field in frame.schema
        ]
        return frame.select(*columns) if texts else frame

    alike = map(read_alike, frames)
    return functools.reduce(lambda a, b: a.unionByName(b, allowMissingColumns=True), alike)


def _root(spark: SparkSession, path: str) -> str:
    """The directory whose partitions are columns: above the first `column=value` of the path, or the path itself."""
    parts = path.split("/")
    outer = next((parts[:i] for i, part in enumerate(parts) if "=" in part), None)
    root = "/".join(outer) if outer is not None else path
    if not root or any(letter in root for letter in "*?[{"):
        return ""
    return root if all(status.isDirectory() for status in _statuses(spark, root)) else ""


def _json_schema(names: dict[str, str], wanted: T.StructType, others: list[str]) -> T.StructType:
    """Every column by its text, but for maps of numbers: what is none of its type is told apart later."""
    columns = {
        names[field.name]: field.dataType if _holds_numbers(field.dataType) else _as_text(field.dataType)
        for field in wanted
    }
    columns |= {name: T.StringType() for name in others}
    return T.StructType([T.StructField(name, kind) for name, kind in columns.items()])


def _holds_numbers(kind: T.DataType) -> bool:
    return isinstance(kind.elementType if isinstance(kind, T.ArrayType) else kind, T.MapType)


def _as_text(kind: T.DataType) -> T.DataType:
    if isinstance(kind, T.ArrayType):
        return T.ArrayType(_as_text(kind.elementType))
    return _STRINGS if isinstance(kind, T.MapType) else T.StringType()


def _conform(
    raw: DataFrame, known: dict[str, str], wanted: T.StructType, data: Data, in_millionths: bool = False
) -> DataFrame:
    """Every wanted column in its type, from the columns of `raw` by our names in `known`."""
    types = {field.name: field.dataType for field in raw.schema.fields}
    by_text = types.get(_AGAIN)
    again = {field.name: field.dataType for field in by_text.fields} if isinstance(by_text, T.StructType) else {}
    unreadable: list[Column] = []
    # Maps whose nulls may stay until rows are compact: what drops them is not compiled by Spark, which copies every row
    # before it, names and all. A bare reward is added where the map has none, and so must be told of a null by then.
    may_hold_null: tuple[str, ...] = ()
    if "action" in wanted.names:
        may_hold_null = ("state_features",) if REWARD in known else ("state_features", "metrics")
    bounds: dict[str, tuple[Any, Any]] = {
        "sequence_number": (-FURTHEST, FURTHEST - 1),
        # Of decisions: when an outcome came is compared alone.
        **({"event_time": (EARLIEST, LATEST)} if "action" in wanted.names else {}),
    }

    def read(ours: str, kind: T.DataType, column: str) -> Column:
        given = F.col(f"`{column}`")
        if ours == "sequence_number" and in_millionths:
            value = F.round(F.try_multiply(given.try_cast("decimal(38,9)"), F.lit(MICROSECONDS))).try_cast("bigint")
            bad: Column | None = None
        elif ours in may_hold_null and types[column] == kind:
            value, bad = given, None
        else:
            value, bad = _typed(given, types[column], kind)
        if column in again:
            other, unfit = _typed(F.col(f"{_AGAIN}.`{column}`"), again[column], kind)
            if _holds_numbers(kind):
                bad = _twice(given) if isinstance(kind, T.MapType) else F.exists(given, lambda one: one.isNull())
            fits, nothing = F.col(_AGAIN).isNull(), F.lit(False)
            value = F.when(fits, value).otherwise(other)
            bad = F.when(fits, nothing if bad is None else bad).otherwise(nothing if unfit is None else unfit)
        if ours in bounds:
            value = F.when(value.between(*bounds[ours]), value)
            bad = given.isNotNull() & value.isNull()
        if bad is not None:
            unreadable.append(F.when(bad, F.lit(ours)))
        return value

    columns = {
        field.name: read(field.name, field.dataType, known[field.name])
        if field.name in known
        else F.lit(None).cast(field.dataType)
        for field in wanted
    }
    if "possible_actions" in known:
        # An action was taken: an empty list, as ReAgent writes it at the end of an MDP, is none. In an array of one, as
        # what is computed for it is then computed once.
        listed = F.filter(F.array(columns["possible_actions"]), lambda actions: F.size(actions) > 0)
        columns["possible_actions"] = F.get(listed, F.lit(0))
    if data.state_columns:
        parts = [
            F.struct(F.lit(name).alias("k"), read("state_features", T.DoubleType(), name).alias("v"))
            for name in data.state_columns
        ]
        columns["state_features"] = F.map_from_entries(F.array(*parts))
    if REWARD in known:
        columns["metrics"] = _with_reward(columns["metrics"], read(REWARD, T.DoubleType(), known[REWARD]))
    if "event_time" in columns and "event_time" not in known and "action" in columns:
        columns["event_time"] = _made_time(columns["sequence_number"], raw, data)
    torn = F.col(_TORN) if _TORN in raw.columns else F.lit(None).cast("string")
    whole = F.to_json(F.struct(*[F.col(f"`{name}`") for name in raw.columns if name != _TORN]))
    as_it_was = F.col(_TEXT) if _TEXT in raw.columns else F.coalesce(torn, whole)
    unreadable.insert(0, F.when(torn.isNotNull(), F.lit(LINE)))
    if data.partition:
        unreadable.append(F.when(F.col(f"`{data.partition.column}`").isNull(), F.lit(data.partition.column)))
    metadata = {"sequence_number": {"in_millionths": True}} if in_millionths else {}
    brought = dict.fromkeys([*data.features.keys, *(["ds"] if "ds" in raw.columns else [])])
    return raw.select(
        *[column.alias(name, metadata=metadata.get(name, {})) for name, column in columns.items()],
        *[F.col(f"`{name}`") for name in brought],
        as_it_was.alias(AS_IT_WAS, metadata={"text": True} if _TORN in raw.columns else {}),
        F.coalesce(*unreadable).alias(UNREADABLE),
    )


def _typed(raw: Column, given: T.DataType, wanted: T.DataType) -> tuple[Column, Column | None]:
    """A column in its wanted type, null where it cannot be; and where that is so, if it can happen at all."""
    if given == wanted and isinstance(wanted, T.MapType):
        return without_nulls(raw), None
    if given == wanted and _holds_numbers(wanted):
        return F.transform(raw, lambda one: F.map_filter(one, lambda _, v: v.isNotNull())), None
    if given == wanted:
        return raw, None
    if isinstance(wanted, T.LongType):
        value = _ordinal(raw, given)
    elif _holds_numbers(wanted):
        return _number_map(raw, given) if isinstance(wanted, T.MapType) else _number_maps(raw, given)
    elif isinstance(wanted, T.ArrayType):
        value = F.from_json(raw, "array<string>") if isinstance(given, T.StringType) else raw.try_cast("array<string>")
    elif isinstance(wanted, T.TimestampType) and isinstance(given, (T.NumericType, T.StringType)):
        # A number is of seconds since 1970, also where all is text.
        seconds = raw.try_cast("double")
        value = F.when(seconds.between(0, LAST_MICROSECOND / MICROSECONDS), seconds.cast("timestamp"))
        if isinstance(given, T.StringType):
            value = F.when(seconds.isNull(), _time(raw)).otherwise(value)
            # A day, more likely than a second of 1970.
            value = F.when(~raw.rlike(r"^\d{8}$"), value)
    else:
        value = raw.try_cast(wanted)
    return value, raw.isNotNull() & value.isNull()


def without_nulls(numbers: Column) -> Column:
    """A map without what is null in it."""
    # The least value is null where one is; only then each is looked at, which is slow.
    full = F.get(F.sort_array(F.map_values(numbers)), F.lit(0)).isNotNull()
    return F.when(full, numbers).otherwise(F.map_filter(numbers, lambda _, v: v.isNotNull()))


def _ordinal(raw: Column, given: T.DataType) -> Column:
    """A place in an order as a whole number: a number's own, a time's microseconds since 1970."""
    if isinstance(given, (T.TimestampType, T.TimestampNTZType, T.DateType)):
        return F.unix_micros(raw.cast("timestamp"))
    if isinstance(given, T.StringType):
        number = F.coalesce(raw.try_cast("bigint"), _whole(raw.try_cast("double")))
        return F.coalesce(number, F.unix_micros(_time(raw)))
    if isinstance(given, T.DecimalType):
        return F.when(raw == F.floor(raw), raw.try_cast("bigint"))
    if isinstance(given, (T.DoubleType, T.FloatType)):
        return _whole(raw.cast("double"))
    return raw.try_cast("bigint")


def _time(text: Column) -> Column:
    # A time without a date is one of today to Spark.
    return F.when(~text.rlike(r"^\s*T?\d{1,2}:"), text.try_cast("timestamp"))


def _whole(number: Column) -> Column:
    return F.when(number % 1 == 0, number.try_cast("bigint"))


def _number_map(raw: Column, given: T.DataType) -> tuple[Column, Column]:
    """A map of numbers by name; a null value is an absent one."""
    texts = raw
    if isinstance(given, T.StringType):
        texts = F.from_json(raw, _STRINGS)
    elif isinstance(given, T.StructType):
        texts = F.from_json(F.to_json(raw), _STRINGS)
    elif not isinstance(given, T.MapType):
        return F.lit(None).cast("map<string,double>"), raw.isNotNull()
    twice = _twice(texts)
    present = F.map_filter(F.when(~twice, texts), lambda _, v: v.isNotNull())
    of_text = not isinstance(given, T.MapType) or isinstance(given.valueType, T.StringType)

    def number(_: Column, value: Column) -> Column:
        # Of JSON's text Spark gives NaN with the marks of a string around it.
        return (F.btrim(value, F.lit('"')) if of_text else value).try_cast("double")

    numbers = F.transform_values(present, number)
    bad = twice | F.exists(F.map_values(numbers), lambda v: v.isNull())
    if isinstance(given, T.MapType) and not isinstance(given.keyType, T.StringType):
        numbers = F.transform_keys(numbers, lambda k, _: k.cast("string"))
    return numbers, (raw.isNotNull() & texts.isNull()) | F.coalesce(bad, F.lit(False))


def _twice(of: Column) -> Column:
    """Whether a map has a name twice, which Spark reads, and fails on later."""
    return F.size(F.map_keys(of)) != F.size(F.array_distinct(F.map_keys(of)))


def _number_maps(raw: Column, given: T.DataType) -> tuple[Column, Column]:
    """A list of maps of numbers by name."""
    if isinstance(given, T.ArrayType) and isinstance(given.elementType, T.StructType):
        raw, given = F.to_json(raw), T.StringType()
    if isinstance(given, T.StringType):
        texts = F.from_json(raw, T.ArrayType(_STRINGS))
    elif isinstance(given, T.ArrayType) and isinstance(given.elementType, T.MapType):
        texts = raw
    else:
        return F.lit(None).cast("array<map<string,double>>"), raw.isNotNull()
    present = F.transform(texts, lambda one: F.map_filter(one, lambda _, v: v.isNotNull()))
    numbers = F.transform(present, lambda one: F.transform_values(one, lambda _, v: v.try_cast("double")))
    bad = F.exists(numbers, lambda one: one.isNull() | F.exists(F.map_values(one), lambda v: v.isNull()))
    return numbers, (raw.isNotNull() & texts.isNull()) | F.coalesce(bad, F.lit(False))


def _with_reward(metrics: Column, reward: Column) -> Column:
    """The metrics with a bare reward among them, unless they name one themselves."""
    known = F.coalesce(metrics, F.create_map().cast("map<string,double>"))
    added = F.map_concat(known, F.create_map(F.lit(REWARD), reward))
    return F.when(reward.isNull() | F.map_contains_key(known, REWARD), metrics).otherwise(added)


def _made_time(order: Column, raw: DataFrame, data: Data) -> Column:
    """Times in the order of a log that has none: the partition's day, and a microsecond for each step.

    A sequence number that is a time itself, or a count too long for a day, is taken for microseconds since 1970, and
    one too large for those for nanoseconds.
    """
    day = data.partition.column if data.partition else "ds"
    within = order.between(FIRST_MICROSECOND, LAST_MICROSECOND)
    of_nanos = F.floor(order.cast("decimal(19,0)") / 1000).cast("bigint")
    micros = F.timestamp_micros(F.when(within, order).otherwise(of_nanos))
    if day not in raw.columns:
        return micros
    started = F.unix_micros(F.col(day).cast("string").try_cast("timestamp"))
    return F.when(
        order.between(0, DAY_MICROSECONDS) & started.isNotNull(), F.timestamp_micros(started + order)
    ).otherwise(micros)


def _statuses(spark: SparkSession, path: str) -> list[Any]:
    jvm_path = spark._jvm.org.apache.hadoop.fs.Path(path)  # type: ignore[union-attr]
    found = jvm_path.getFileSystem(spark._jsc.hadoopConfiguration()).globStatus(jvm_path)
    return list(found or [])


def _form(spark: SparkSession, path: str) -> str:
    """The format that file names tell, some directories down if need be."""
    for status in _statuses(spark, path):
        names = _names_below(spark, status) if status.isDirectory() else [status.getPath().getName()]
        if form := next(filter(None, map(_form_of, names)), ""):
            return form
    return ""


def _form_of(name: str) -> str:
    stem = name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".zst")
    return next((form for suffix, form in SUFFIXES.items() if stem.endswith(suffix)), "")


def _names_below(spark: SparkSession, directory: Any, depth: int = 3) -> list[str]:
    path = directory.getPath()
    names = []
    for status in path.getFileSystem(spark._jsc.hadoopConfiguration()).listStatus(path):
        if status.getPath().getName().startswith(("_", ".")):
            continue
        if not status.isDirectory():
            names.append(status.getPath().getName())
        elif depth and not names:
            names += _names_below(spark, status, depth - 1)
    return names
