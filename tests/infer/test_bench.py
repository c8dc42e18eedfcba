"""The bench: its arithmetic, that it checks what it times, and what it prints."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from infer.bench import command
from infer.bench.cases import Bench, Cell
from infer.bench.check import check
from infer.bench.command import cells_of
from infer.bench.figures import Measured, ratios
from infer.bench.ladders import SIZES, Size, make_ladder, make_queries, make_tokenizer
from infer.bench.limit import ClockedRates, Rates, growth_exponent, limit_seconds, measure_rates
from infer.bench.stopwatch import Taken
from switchgen import sampling
from switchgen.__main__ import main

MICRO = Size("tiny", 32, 64, 2, 4, 2, 512, max_positions=512)


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch) -> Size:
    """The size called tiny, smaller yet."""
    monkeypatch.setitem(SIZES, "tiny", MICRO)
    return MICRO


def test_the_limit() -> None:
    """1,000 tokens decoded at 100 a second, 6,000 read at 1,000 a second."""
    assert limit_seconds(1000, 6000, Rates(decode=100.0, read=1000.0)) == pytest.approx(16.0)


@pytest.mark.parametrize("exponent", [1.0, 1.37, 2.0])
def test_the_growth_exponent(exponent: float) -> None:
    lengths = [512, 1024, 2048, 4096]
    assert growth_exponent(lengths, [0.3 * length**exponent for length in lengths]) == pytest.approx(exponent)


def entry(case: str, cell: Cell, seconds: list[float], rates: list[Rates] | None = None) -> Measured:
    runs = [Taken(wall_s=2 * s, cpu_s=s, decoded_tokens=100, read_tokens=100, new_tokens=100) for s in seconds]
    clocked = [ClockedRates(wall=Rates(r.decode / 2, r.read / 2), cpu=r) for r in rates or []]
    return Measured(case, cell, runs, clocked)


def test_ratios_are_medians_of_each_repeats_own() -> None:
    """A repeat that ran while the machine was slow is slow on both sides. (a) is the faster of its two forms."""
    cell = Cell("tiny", 4, 512, "ade", 3)
    rates = [Rates(100.0, 100.0), Rates(10.0, 10.0), Rates(100.0, 100.0)]
    measured = [
        entry("a", cell, [1.0, 10.0, 1.0]),
        entry("a-static", cell, [2.0, 9.0, 2.0]),
        entry("d", cell, [2.2, 22.0, 2.4], rates),
        entry("e", cell, [4.4, 44.0, 4.8]),
    ]
    (line,) = ratios(measured)
    for mark in ("", " cpu"):
        assert line[f"d/a{mark}"] == pytest.approx(2.4)
        assert line[f"e/d{mark}"] == pytest.approx(2.0)
        assert line[f"d/L{mark}"] == pytest.approx(1.1)
    assert measured[2].record()["limit_s"] == pytest.approx(4.0)
    assert measured[2].record()["cpu_s"] == pytest.approx(2.4)


def test_ratios_are_of_seconds_a_token() -> None:
    """(a) writes four responses, (d) the twelve of the queue."""
    cell = Cell("tiny", 4, 512, "ad", 1, queries=12)
    alone, switching = entry("a", cell, [1.0]), entry("d", cell, [6.0])
    alone.runs[0].new_tokens, switching.runs[0].new_tokens = 4 * 512, 12 * 512
    (line,) = ratios([alone, switching])
    assert line["d/a"] == line["d/a cpu"] == pytest.approx(2.0)


def test_exponents_need_three_lengths_of_the_same_rows() -> None:
    cells = [Cell("tiny", 4, length, "d", 1) for length in (128, 256, 512)]
    measured = [entry("d", cell, [cell.new_tokens**1.5]) for cell in cells]
    assert ratios(measured)[-1] == {"size": "tiny", "rows": 4, "case": "d", "exponent": 1.5}
    assert "exponent" not in ratios(measured[:2])[-1]


def test_cells() -> None:
    assert {cell.size for cell in cells_of()} == {"tiny", "small"}
    assert cells_of(quick=True, sizes=["small"])[0].size == "small"
    (cell,) = cells_of(sizes=["tiny"], rows=3, new_tokens=[200], cases="b", repeats=2)
    assert (cell.rows, cell.new_tokens, cell.cases, cell.repeats, cell.total) == (3, 200, "b", 2, 3)
    assert cell.limited and not any(cell.limited for cell in cells_of(limited=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "2", "--new-tokens", "60", "--cases", "b"], "at least 100"),
        (["--rows", "2", "--new-tokens", "120", "--cases", "f"], "at least 150"),
        (["--queries", "96"], "give --rows or --new-tokens, too"),
        (["--written", "64"], "give --rows or --new-tokens, too"),
        (["--quick", "--rows", "2"], "--quick is a table of its own"),
        (["--cases", "z"], "unknown case 'z'; allowed: a, b, c, d, e, f"),
        (["--quick", "--compile"], "allowed with --compile: --cases abcde"),
        (["--size", "8b", "--device", "cpu"], "needs a CUDA device; allowed here: tiny, small"),
        (["--quick", "--device", "cuda:9"], "is not here"),
    ],
)
def test_settings_that_make_no_cell(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_text_is_ascii_and_every_token_is_a_whole_character(micro: Size) -> None:
    """So that no segment runs over its limit to complete a character: all cases write the same number of tokens."""
    vocabulary = make_ladder(micro).vocabulary
    assert all(token.isascii() for token in vocabulary.token_bytes)
    assert make_tokenizer(512)(chat=True).get_vocab() == make_tokenizer(512)(chat=False).get_vocab()
    first, again = ([query.text for query in make_queries(make_ladder(micro), 3)] for _ in range(2))
    assert first == again


def test_the_check_finds_a_loop_that_is_wrong(micro: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(micro, "cpu") == 72
    # The loop's sampler looks up another token's random number; the plain loop's import stays as it is.
    right = sampling.sample_tokens

    def wrong(logits_NV: Any, seeds_N: Any, index_N: Any, params: Any) -> Any:
        return right(logits_NV, seeds_N, index_N + 1, params)

    monkeypatch.setattr("switchgen.engines.writing.sample_tokens", wrong)
    with pytest.raises(AssertionError, match="the loop and the plain loop differ on query 0"):
        check(micro, "cpu")


def test_rollouts_read_nothing_twice(micro: Size) -> None:
    """Counted at the models' embeddings, against what the caches hold."""
    bench = Bench(make_ladder(micro))
    notes = bench.rollouts(Cell("tiny", 24, 80, "f", 1, segment=10)).notes
    assert notes["read_twice"] == 0 and notes["fed_tokens"] == notes["held_tokens"]
    assert (notes["prefixes"], notes["completions"]) == (1, 24)
    assert min(notes["fed_tokens"][:3]) > 0


def test_what_is_written_already_is_not_timed(micro: Size) -> None:
    cell = Cell("tiny", 3, 60, "d", 1, written=40, segment=10)
    bench = Bench(make_ladder(micro))
    taken = bench.ours(cell, "d")
    assert taken.new_tokens == taken.decoded_tokens == 3 * 20
    # Each of two rounds: every model that reads on reads a segment, the switcher its question and a signature, too.
    question = len(bench.ladder.switcher.prompt.question_ids)
    assert 3 * 2 * question < taken.read_tokens < 3 * (2 * question + 200)
    # It is read once for all repeats, and for the rates.
    before = sum(engine.stats.read_tokens + engine.stats.scored_tokens for engine in bench.ladder.engines)
    again = bench.ours(cell, "d")
    assert (again.read_tokens, again.decoded_tokens) == (taken.read_tokens, taken.decoded_tokens)
    rates = measure_rates(bench, cell, 2, ["b"])
    after = sum(engine.stats.read_tokens + engine.stats.scored_tokens for engine in bench.ladder.engines)
    assert after - before == again.read_tokens + 2 * 10
    assert rates.decoder == "b" and rates.wall.decode > 0 and rates.wall.read > 0


def test_the_batch_while_queries_wait(micro: Size) -> None:
    """Three queries, two rows: the third waits until one of the first two is done."""
    bench = Bench(make_ladder(micro))
    taken = bench.ours(Cell("tiny", 2, 40, "b", 1, queries=3, segment=10), "b")
    assert taken.refilled_batch == 2.0 and taken.mean_batch == 1.5
    assert bench.ours(Cell("tiny", 2, 20, "b", 1, segment=10), "b").refilled_batch is None


def test_the_slower_of_two_forms_is_timed_once(micro: Size) -> None:
    bench = Bench(make_ladder(micro))
    a, static, d = command.measure(bench, Cell("tiny", 2, 30, "ad", 3, segment=10))
    assert sorted([len(a.runs), len(static.runs)]) == [1, 3] and len(d.runs) == len(d.rates) == 3
    assert len({rates.decoder for rates in d.rates}) == 1
    (line,) = ratios([a, static, d])
    assert line["d/a"] > 0
    assert not command.measure(bench, Cell("tiny", 2, 30, "d", 1, segment=10, limited=False))[0].rates
    assert [entry.case for entry in command.measure(bench, Cell("tiny", 2, 30, "a", 1, segment=10, static=False))] == [
        "a"
    ]


def test_prints_a_table_and_one_json_line_last(
    micro: Size, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = (Cell("tiny", 2, 30, "abcdef", 2, segment=10), *(Cell("tiny", 2, n, "ad", 1, segment=10) for n in (40, 50)))
    monkeypatch.setattr(command, "QUICK", cells)
    threads = torch.get_num_threads()
    assert main(["bench", "--quick"]) == 0
    torch.set_num_threads(threads)
    *table, last = capsys.readouterr().out.strip().split("\n")
    assert [line.split()[0] for line in table[1:8]] == ["a", "a-static", "b", "c", "d", "e", "f"]
    found = json.loads(last)
    assert found["checked_tokens"] == {"tiny": 72}
    first = found["cases"][:7]
    assert [line["case"] for line in first] == ["a", "a", "b", "c", "d", "e", "f"]
    for line in first:
        assert {"case", "size", "rows", "new_tokens", "wall_s", "tokens_per_s", "limit_s", "overhead_share",
                "switcher_share", "read_tokens", "decoded_tokens", "mean_batch", "peak_mb"} <= line.keys()  # fmt: skip
        assert line["wall_min_s"] <= line["wall_s"] <= line["wall_max_s"] and line["cpu_s"] > 0
        assert 0 < line["overhead_share"] < 1 and line["peak_mb"] > 0
        assert (line["limit_s"] is not None) == (line["case"] in "cd")
        if line["case"] in "bcdf":
            shares = [line[f"{part}_share"] for part in ("decode", "read", "overhead")]
            assert min(shares) > 0 and sum(shares) == pytest.approx(1, abs=1e-3)
        else:
            assert line["decode_share"] is line["read_share"] is None
    assert sorted(line["repeats"] for line in first[:2]) == [1, 2] and {line["repeats"] for line in first[2:]} == {2}
    for line in first[:5]:
        assert line["decoded_tokens"] == 60, "all cases write the same number of tokens"
    assert first[4]["switcher_share"] > 0 and first[3]["switcher_share"] == 0
    assert {"b/a", "d/a", "e/d", "d/L", "d/L cpu"} <= found["ratios"][0].keys()
    assert {line["case"] for line in found["ratios"] if "exponent" in line} == {"a", "d"}


def test_memory_prints_its_growth(micro: Size, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--memory", "--queries", "40", "--rows", "4"]) == 0
    found = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert (found["queries"], found["rows"], found["evicted_rows"]) == (40, 4, 0)
    assert found["peak_mb"] >= found["warm_mb"] > 0
    assert found["growth"] == pytest.approx(found["peak_mb"] / found["warm_mb"] - 1, abs=1e-3)
