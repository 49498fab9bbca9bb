"""TOML and overrides: nothing that was mistyped may pass, and what is written reads back equal."""

from __future__ import annotations

import json
import random
import re
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from vatt.engine.config import ConfigError, ModelConfig, RunConfig, TextConfig, VideoConfig
from vatt.engine.config_file import (
    OPTIONS,
    SECTIONS,
    expected,
    from_tree,
    load_run,
    nearest,
    recipes,
    reference,
    reference_rows,
    to_toml,
)

RECIPES = recipes()
LETTERS = "abcdefghijklmnopqrstuvwxyz_"
WORDS = ["--model.text.word_table_file", "words.npy"]


def loads(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load_run(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loads(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_the_shipped_recipes_are_found_by_name():
    names = {f"pretrain/{folder}{name}" for folder in ("", "released/") for name in ("bbs", "mbs", "lbs", "ma")}
    assert names | {"pretrain/tiny"} <= set(RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_loads_by_name_and_by_path_and_reads_back_equal(name, tmp_path):
    overrides = WORDS if "released/" in name else []
    run = load_run(name, overrides)
    assert run == load_run(RECIPES[name], overrides) == load_run(f"{name}.toml", overrides)
    assert loads(tmp_path, to_toml(run)) == run
    assert loads(tmp_path, to_toml(run.with_buckets())) == run.with_buckets()


@pytest.mark.parametrize("name", ["bbs", "mbs", "lbs", "ma"])
def test_a_released_recipe_asks_for_its_word_table(name):
    with pytest.raises(ConfigError, match=r"model\.text\.word_table_file: a frozen word table needs a file"):
        load_run(f"pretrain/released/{name}")


@pytest.mark.parametrize("name", ["bbs", "mbs", "lbs", "ma"])
def test_paper_and_released_recipes_differ_where_they_should(name):
    paper, released = load_run(f"pretrain/{name}"), load_run(f"pretrain/released/{name}", WORDS)

    def facts(run: RunConfig) -> dict[str, object]:
        return {
            "dropout": (run.model.dropout, run.model.attention_dropout),
            "schedule": (run.optimizer.warmup, run.optimizer.schedule),
            "mean": run.loss.mean,
            "crop": (run.augment.crop, run.augment.jitter_probability, run.augment.audio_noise),
            "words": run.model.text.word_table,
            "epsilon": (run.optimizer.epsilon, run.optimizer.epsilon_form),
            "kept": run.drop_rate.choice,
        }

    assert facts(paper) == {
        "dropout": (0.0, 0.0),
        "schedule": (10000, "quarter_cosine"),
        "mean": "global",
        "crop": ("inception", 1.0, 0.0),
        "words": "learned",
        "epsilon": (1e-8, "pytorch"),
        "kept": "per_sample",
    }
    assert facts(released) == {
        "dropout": (0.1, 0.1),
        "schedule": (5000, "half_cosine"),
        "mean": "per_replica",
        "crop": ("scale_jitter", 0.8, 0.01),
        "words": "frozen",
        "epsilon": (1e-7, "tensorflow"),
        "kept": "shared",
    }
    for run in (paper, released):
        assert (run.steps, run.batch_size, run.optimizer.learning_rate, run.optimizer.final_learning_rate) == (
            500000,
            2048,
            1e-4,
            5e-5,
        )
        assert (run.drop_rate.video, run.drop_rate.audio, run.loss.temperature, run.loss.form) == (0.5, 0.5, 0.07, "row_column")
        assert (run.video_grid, run.audio_grid) == ((8, 14, 14), 1200)
        assert (run.model.text.vocabulary, run.model.text.word_width, run.data.captions, run.data.words) == (65536, 300, 5, 16)
        assert run.model.kind == ("agnostic" if name == "ma" else "specific")
        if name == "ma":
            assert run.model.shared.size == "medium"
        else:
            towers = (run.model.video.size, run.model.audio.size, run.model.text.size)
            assert towers == ({"bbs": "base", "mbs": "medium", "lbs": "large"}[name], "base", "small")


def test_an_unknown_recipe_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"pretrain/tinny: no such file or recipe\. Did you mean pretrain/tiny\?") as caught:
        load_run("pretrain/tinny")
    assert all(name in str(caught.value) for name in RECIPES)


def test_a_folder_is_not_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        load_run(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(ConfigError, match="did you mean the config.toml inside it"):
        load_run(tmp_path)


# ---- mistyped keys ---------------------------------------------------------------------------------------------------


def mutations(name: str) -> list[str]:
    """Every dropped, doubled, swapped and replaced character of a name (one replacement a place)."""
    dropped = [name[:i] + name[i + 1 :] for i in range(len(name))]
    doubled = [name[:i] + name[i] + name[i:] for i in range(len(name))]
    swapped = [name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)]
    other = [LETTERS[(LETTERS.index(c) + 7) % len(LETTERS)] if c in LETTERS else "x" for c in name]
    replaced = [name[:i] + c + name[i + 1 :] for i, c in enumerate(other)]
    return sorted({m for m in dropped + doubled + swapped + replaced if m and m != name})


def mistyped_recipes(name: str) -> list[tuple[str, str]]:
    """(TOML text, the dotted key that is wrong in it) for every mutation of every key and section header of a recipe."""
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    section, found = "", []
    for i, line in enumerate(lines):
        header, setting = re.match(r"\[([a-z_.]+)\]", line), re.match(r"([a-z_0-9]+) = ", line)
        if header:
            section = header.group(1)
            for wrong in mutations(section):
                if wrong not in SECTIONS and not re.search(r"^\.|\.$|\.\.", wrong):
                    found.append(("\n".join([*lines[:i], f"[{wrong}]", *lines[i + 1 :]]), wrong))
        elif setting:
            for wrong in mutations(setting.group(1)):
                dotted = f"{section}.{wrong}" if section else wrong
                found.append(("\n".join([*lines[:i], line.replace(setting.group(1), wrong, 1), *lines[i + 1 :]]), dotted))
    assert len({key for _, key in found}) > 300
    return found


def assert_caught(tmp_path: Path, mistyped: list[tuple[str, str]]) -> None:
    for text, wrong in mistyped:
        message = refusal(tmp_path, text)
        assert message.startswith(f"{tmp_path / 'run.toml'}: {wrong}"), message
        assert "the nearest is " in message or "expected a section" in message, message


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_mistyped_key_of_a_recipe_is_caught(name, tmp_path):
    assert_caught(tmp_path, random.Random(name).sample(mistyped_recipes(name), 60))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_mistyped_key_of_a_recipe_is_caught(name, tmp_path):
    assert_caught(tmp_path, mistyped_recipes(name))


def suggestion_rate(mistyped: list[tuple[str, str]]) -> float:
    return sum(nearest(wrong) == right for right, wrong in mistyped) / len(mistyped)


def _mistyped_keys() -> list[tuple[str, str]]:
    return [(key, wrong) for key in OPTIONS for wrong in mutations(key) if wrong not in OPTIONS]


def test_the_nearest_key_is_the_one_that_was_meant():
    sample = random.Random(0).sample(_mistyped_keys(), 600)
    assert suggestion_rate(sample) >= 0.95


@pytest.mark.soak
def test_the_nearest_key_over_every_mutation():
    mistyped = _mistyped_keys()
    rate = suggestion_rate(mistyped)
    print(f"\n{len(mistyped)} mistyped keys: the suggestion is right for {rate:.2%}")
    assert rate >= 0.95


def test_an_unknown_key_names_file_key_and_nearest(tmp_path):
    message = refusal(tmp_path, "[model.video]\npacth = [4, 16, 16]\n")
    assert message == f"{tmp_path / 'run.toml'}: model.video.pacth: unknown key; the nearest is model.video.patch"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle.video]\npatch = [4, 16, 16]\n", "modle.video.patch: unknown key; the nearest is model.video.patch"),
        ("[modle]\n", "modle: unknown section; the nearest is model"),
        ("model = 3\n", "model: expected a section, [model], got integer 3"),
        ("[seed]\nx = 1\n", "seed: expected an integer, got a table"),
        ("[[model]]\n", "model: expected a section, [model], got array"),
    ],
)
def test_sections_are_checked_too(tmp_path, text, message):
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "gradient_accumulation_steps = 4\n",
        "[optimizer]\ngradient_accumulation_steps = 4\n",
        "[backend]\ngradient_accumulation_steps = 4\n",
        "[deepspeed]\ngradient_accumulation_steps = 1\n",
    ],
)
def test_accumulation_is_refused_with_the_reason_wherever_it_stands(tmp_path, text):
    message = refusal(tmp_path, text)
    assert "gradient_accumulation_steps" in message and "micro-batch" in message and "backend.chunk" in message


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("train_batch_size = 64\n", "batch_size"),
        ("train_micro_batch_size_per_gpu = 8\n", "batch_size"),
        ("[zero_optimization]\nstage = 2\n", "backend.zero_stage"),
        ("[bf16]\nenabled = true\n", "backend.precision"),
        ("[backend.fp16]\nenabled = true\n", "backend.precision"),
        ("gradient_clipping = 1.0\n", "not clipped"),
    ],
)
def test_what_people_paste_from_deepspeed_names_our_key(tmp_path, text, remedy):
    assert remedy in refusal(tmp_path, text)


# ---- types -----------------------------------------------------------------------------------------------------------


def wrong_values(kind: object) -> list[str]:
    """TOML values that are not of a type, the tempting ones first."""
    if get_origin(kind) is Literal:
        return ['"nonsense"', "true", "[1]", "7.5"]
    if get_origin(kind) is tuple:
        count = len(get_args(kind))
        element = "1.5" if get_args(kind)[0] is int else '"a"'
        return ["3", '"4,16,16"', str([1] * (count + 1)), str([1] * (count - 1)), f"[{', '.join([element] * count)}]", "[]"]
    return {
        int: ["true", "1.0", '"3"', "[3]"],
        float: ["true", '"0.1"', "[0.1]", "nan", "inf"],
        bool: ["1", "0", '"true"'],
        str: ["1", "true", '["a"]'],
    }[kind]  # type: ignore[index]


@pytest.mark.parametrize("key", OPTIONS)
def test_a_value_of_the_wrong_type_names_key_value_and_type(key, tmp_path):
    section, _, name = key.rpartition(".")
    for value in wrong_values(OPTIONS[key].kind):
        message = refusal(tmp_path, (f"[{section}]\n" if section else "") + f"{name} = {value}\n")
        assert message.startswith(f"{tmp_path / 'run.toml'}: {key}: expected {expected(OPTIONS[key].kind)}, got "), message


def test_an_integer_is_a_number(tmp_path):
    run = loads(tmp_path, "[optimizer]\nlearning_rate = 1\n[augment]\narea = [1, 1]\n")
    assert run.optimizer.learning_rate == 1.0 and type(run.optimizer.learning_rate) is float
    assert run.augment.area == (1.0, 1.0) and type(run.augment.area[0]) is float


def test_choices_are_listed(tmp_path):
    message = refusal(tmp_path, '[loss]\nform = "rows"\n')
    assert 'loss.form: expected one of "row_column", "symmetric", "all_pairs", got string "rows"' in message
    assert "backend.zero_stage: expected one of 0, 1, 2, 3, got boolean true" in refusal(
        tmp_path, "[backend]\nzero_stage = true\n"
    )


def test_complaints_of_nested_records_carry_their_section(tmp_path):
    assert "run.toml: model.video.heads: width 768 is not a multiple of 5 heads" in refusal(
        tmp_path, "[model.video]\nheads = 5\n"
    )
    assert "run.toml: model.text.word_table_file: a frozen" in refusal(tmp_path, '[model.text]\nword_table = "frozen"\n')
    assert "run.toml: data.frames: 2 is less than one patch of 4" in refusal(tmp_path, "[data]\nframes = 2\n")
    assert "command line: --model.video.heads: width" in refusal(tmp_path, "", "--model.video.heads", "5")


@pytest.mark.parametrize("text", ["seed = \n", "seed = 1\nseed = 2\n", "[data\n", "seed = 1e\n"])
def test_what_is_not_toml_says_so_with_its_line(tmp_path, text):
    message = refusal(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'run.toml'}: not TOML: ") and "line" in message


def test_a_binary_file_is_not_toml(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(ConfigError, match="run.toml: not TOML"):
        load_run(tmp_path / "run.toml")


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_are_read_by_the_type_of_their_field(tmp_path):
    run = loads(
        tmp_path,
        "seed = 3\n",
        *("--optimizer.learning_rate", "3e-4"),
        "--model.video.patch=2,8,8",
        *("--log.tensorboard", "false"),
        "--data.train=a=b.jsonl",
        *("--augment.area", "[0.2, 1]"),
        *("--backend.zero_stage", "2"),
        *("--backend.name", "torch"),
        "--data.test=",
        *("--loss.video_text_weight", "-0.5"),
        *("--seed", "9"),
    )
    assert run.optimizer.learning_rate == 3e-4
    assert run.model.video.patch == (2, 8, 8)
    assert run.log.tensorboard is False
    assert (run.data.train, run.data.test) == ("a=b.jsonl", "")
    assert run.augment.area == (0.2, 1.0)
    assert (run.backend.zero_stage, run.backend.name) == (2, "torch")
    assert run.loss.video_text_weight == -0.5
    assert run.seed == 9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.video.pacth", "4,16,16"], "--model.video.pacth: unknown key; the nearest is model.video.patch"),
        (
            ["--gradient_accumulation_steps", "4"],
            "--gradient_accumulation_steps: unknown key; gradient accumulation is refused",
        ),
        (["--backend.gradient_accumulation_steps", "4"], "--backend.gradient_accumulation_steps: must be 1"),
        (["--seed", "1", "--seed=2"], "--seed: given twice"),
        (["--seed"], "--seed: needs a value, an integer"),
        (["--seed", "--steps", "4"], "--seed: needs a value"),
        (["--steps", "1e4"], "--steps: expected an integer, got '1e4'"),
        (["--steps", "true"], "--steps: expected an integer, got 'true'"),
        (["--optimizer.learning_rate", "fast"], "--optimizer.learning_rate: expected a number, got 'fast'"),
        (["--optimizer.learning_rate", "nan"], "--optimizer.learning_rate: expected a number, got 'nan'"),
        (["--log.tensorboard", "1"], "--log.tensorboard: expected true or false, got '1'"),
        (["--model.video.patch", "4,16"], "--model.video.patch: expected an array of 3 integers, got '4,16'"),
        (["--model.video.patch", "4,16,x"], "--model.video.patch: expected an array of 3 integers"),
        (["--backend.zero_stage", "4"], "--backend.zero_stage: expected one of 0, 1, 2, 3, got '4'"),
        (["--model.video", "3"], "--model.video: unknown key"),
        (["seed", "1"], "expected --section.key VALUE, got 'seed'"),
        (["--", "1"], "expected --section.key VALUE"),
    ],
)
def test_overrides_that_are_refused(tmp_path, overrides, message):
    assert f"command line: {message}" in refusal(tmp_path, "", *overrides)


def test_a_size_on_the_command_line_replaces_the_files_shape(tmp_path):
    resolved = to_toml(load_run("pretrain/bbs"))
    assert "layers = 12" in resolved
    video = loads(tmp_path, resolved, "--model.video.size", "large").model.video
    assert video == VideoConfig(size="large")
    assert loads(tmp_path, resolved, "--model.video.size", "large", "--model.video.layers", "2").model.video.layers == 2
    custom = loads(tmp_path, resolved, "--model.video.size", "custom", "--model.video.layers", "3").model.video
    assert (custom.layers, custom.width) == (3, 768)
    assert loads(tmp_path, resolved, "--model.video.size", "large").model.audio.layers == 12


def test_a_shape_on_the_command_line_stands_beside_the_files_size(tmp_path):
    video = loads(tmp_path, '[model.video]\nsize = "large"\n', "--model.video.layers", "2").model.video
    assert (video.layers, video.width) == (2, 1024)


def test_the_audio_span_follows_the_frames_unless_it_was_chosen(tmp_path):
    resolved = to_toml(RunConfig())
    assert loads(tmp_path, resolved, "--data.frames", "16").data.audio_samples == 76800
    assert loads(tmp_path, resolved, "--data.frames", "16", "--data.audio_samples", "1280").data.audio_samples == 1280
    chosen = "[data]\naudio_samples = 96000\n"
    assert loads(tmp_path, chosen, "--data.frames", "16").data.audio_samples == 96000


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_everything_is_written_and_reads_back_equal(tmp_path):
    odd = RunConfig(
        output='a "quoted" \\ path\twith\x7f and é',
        seed=2**63 - 1,
        optimizer=replace(RunConfig().optimizer, learning_rate=1 / 3, epsilon=1e-300, final_learning_rate=1e22),
        model=ModelConfig(text=TextConfig(word_table="frozen", word_table_file="C:\\words.npy"), dropout=0.1),
        log=replace(RunConfig().log, tensorboard=False),
    )
    text = to_toml(odd)
    assert loads(tmp_path, text) == odd
    flat: dict[str, object] = {}

    def walk(table: dict[str, object], prefix: str) -> None:
        for name, value in table.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    walk(tomllib.loads(text), "")
    assert list(flat) == list(OPTIONS), "complete, in the order of the records"


def test_tables_from_elsewhere_are_checked_the_same():
    run = load_run("pretrain/lbs")
    assert from_tree(json.loads(json.dumps(asdict(run)))) == run
    with pytest.raises(ConfigError, match=r"^model\.video\.pacth: unknown key; the nearest is model\.video\.patch$"):
        from_tree({"model": {"video": {"pacth": [4, 16, 16]}}})
    with pytest.raises(ConfigError, match=r"^model\.video\.heads: width 768"):
        from_tree({"model": {"video": {"heads": 5}}})


def test_the_reference_explains_every_setting():
    text = reference()
    for key, option in OPTIONS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{key}` |"))
        assert option.sentence in row
    assert [row["key"] for row in reference_rows()] == list(OPTIONS)
    assert "| `model.video.patch` | an array of 3 integers | `[4, 16, 16]` |" in text
