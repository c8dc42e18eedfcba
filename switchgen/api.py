"""The public Python API: `generate` writes responses, `decide` says which model comes next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from switchgen.candidates import Pool, Switcher
from switchgen.config import BaselinesConfig, DecodingConfig, RouterConfig, nearest
from switchgen.engines.remote import RemoteEngine
from switchgen.errors import ConfigError
from switchgen.ids import derive_seed
from switchgen.loop import Loop
from switchgen.policies import FixedPolicy, Policy, RandomPolicy, SwitcherPolicy
from switchgen.policies.fixed import SHARE_POLICIES, ShareRandomPolicy, parse_share
from switchgen.policies.judge import Judge, JudgePolicy
from switchgen.policies.masked import leave_out, split_name
from switchgen.policies.responses import ResponsePolicy, is_response_policy, parse_response_policy
from switchgen.policies.routers import JUDGE, RouterPolicy, check_router, is_router
from switchgen.policies.routing import PROMPTED, ROUTING_POLICIES, RoutingPolicy, ask_for_answerer
from switchgen.response_loop import ResponseLoop
from switchgen.rows import Row
from switchgen.token_loop import TokenLoop
from switchgen.trace import Query, Segment, Trace

AnyPolicy = Policy | RouterPolicy | ResponsePolicy
AnyLoop = Loop | TokenLoop | ResponseLoop

POLICIES = ("switcher", "untuned", "random", *ROUTING_POLICIES)
"""Policies by name, beside every candidate's own name."""


def make_policy(
    name: str,
    pool: Pool,
    *,
    switcher: Switcher | None = None,
    temperature: float = 1.0,
    top_p: float = 0.9,
    router: RouterConfig | None = None,
    judge: Judge | None = None,
    baselines: BaselinesConfig | None = None,
) -> AnyPolicy:
    """The policy of a name: `switcher`, `untuned`, `random`, a candidate's name, a token router's, or a baseline's.

    Args:
        switcher: the model behind `switcher` and `routing` (with its adapter), `untuned` and `prompted-routing`
            (without).
        temperature, top_p: how the switcher's probabilities become a choice.
        router: what a token router's name leaves open (γ, the predictor), and its function words.
        judge: the model behind `baco-judge`.
        baselines: settings of `prompted-routing` and of the policies over whole responses.

    Raises:
        ConfigError: no such policy, a pool of one where a choice is needed, or no switcher or judge given.
    """
    if name in pool.names:
        return FixedPolicy(pool.index(name), name)
    check_policy(name, pool.names, router)
    rule, left_out = split_name(name)
    if left_out:
        inner = make_policy(
            rule, pool, switcher=switcher, temperature=temperature, top_p=top_p, router=router, judge=judge,
            baselines=baselines,
        )  # fmt: skip
        assert not isinstance(inner, RouterPolicy | ResponsePolicy), "checked by its name"
        return leave_out(inner, name, frozenset(map(pool.index, left_out)), len(pool))
    if name == "random":
        return RandomPolicy()
    if is_share(name):
        return ShareRandomPolicy(name, base=0, aligned=len(pool) - 1)
    if is_router(name):
        return make_router(name, pool, settings=router, judge=judge)
    if is_response_policy(name):
        return ResponsePolicy(name, pool, baselines)
    if switcher is None:
        raise ConfigError(f"policy {name!r} needs a switcher model; load one with Pool.load_switcher")
    check_switcher(switcher, pool)
    if name == PROMPTED:
        switcher = ask_for_answerer(switcher, pool.names, (baselines or BaselinesConfig()).descriptions)
    kind = RoutingPolicy if name in ROUTING_POLICIES else SwitcherPolicy
    return kind(switcher, temperature=temperature, top_p=top_p, name=name)


def check_switcher(switcher: Switcher, pool: Pool) -> None:
    """See that a switcher was loaded for as many candidates as the pool has.

    Raises:
        ConfigError: it was loaded for another pool.
    """
    if switcher.prompt.num_candidates != len(pool):
        raise ConfigError(
            f"the switcher chooses between {switcher.prompt.num_candidates} candidates, the pool has {len(pool)} "
            f"({', '.join(pool.names)}); load it with this pool's load_switcher"
        )


def make_router(
    name: str, pool: Pool, *, settings: RouterConfig | None = None, judge: Judge | None = None
) -> RouterPolicy:
    """A token router between the first and the last candidate.

    Raises:
        ConfigError: their vocabularies differ, or a judge is needed and not given.
    """
    base, aligned = pool.candidates[0], pool.candidates[-1]
    difference = base.vocabulary.first_difference(aligned.vocabulary)
    if difference is not None:
        raise ConfigError(
            f"policy {name!r} chooses at every token, which needs one vocabulary; "
            f"{base.name} and {aligned.name} differ: {difference}; segment policies (switcher, random) work with both"
        )
    for candidate in (base, aligned):
        if isinstance(candidate.engine, RemoteEngine):
            raise ConfigError(f"policy {name!r} needs both models' logits at every token; {candidate.name} is behind "
                              "servers (engine: openai)")  # fmt: skip
    last = len(pool) - 1
    if name != JUDGE:
        return RouterPolicy(name, base.vocabulary, base=0, aligned=last, settings=settings)
    if judge is None:
        raise ConfigError(f"policy {name!r} needs a judge; load one with switchgen.policies.judge.load_judge")
    return JudgePolicy(name, base.vocabulary, judge, base=0, aligned=last)


def make_loop(pool: Pool, policy: AnyPolicy, decoding: DecodingConfig, *, max_rows: int) -> AnyLoop:
    """The loop that a policy's granularity needs: segments, tokens, or whole responses.

    Raises:
        ConfigError: decoding settings that a token router or a rule over whole responses cannot honour.
    """
    if not isinstance(policy, RouterPolicy | ResponsePolicy):
        return Loop(pool, policy, decoding, max_rows=max_rows)
    check_decoding(policy.name, decoding)
    if isinstance(policy, ResponsePolicy):
        return ResponseLoop(pool, policy, decoding, max_rows=max_rows)
    return TokenLoop(pool, policy, decoding, max_rows=max_rows)


def check_decoding(name: str, decoding: DecodingConfig) -> None:
    """See that decoding settings mean something under a policy of this name.

    Raises:
        ConfigError: settings about segments, for a token router or a rule over whole responses.
    """
    for key in ("first", "last", "cue") if is_router(name) or is_response_policy(name) else ():
        if getattr(decoding, key) is not None:
            raise ConfigError(f"policy {name!r} has no segments: decoding.{key} must be null, got "
                              f"{getattr(decoding, key)!r}")  # fmt: skip


def is_share(name: str) -> bool:
    """Whether a policy's name means random switching with a share γ: `segment-rand@γ`, `response-rand@γ`."""
    return name.partition("@")[0] in SHARE_POLICIES


def check_policy(name: str, names: Sequence[str], router: RouterConfig | None = None) -> None:
    """See that a policy's name can work with candidates of these names.

    Args:
        router: what a token router's name leaves open.

    Raises:
        ConfigError: it cannot.
    """
    if name in names:
        return
    rule, left_out = split_name(name)
    if left_out:
        check_policy(rule, names, router)
        check_left_out(name, left_out, names)
        return
    if is_router(name):
        check_router(name, router or RouterConfig())
    elif is_share(name):
        parse_share(name)
    elif is_response_policy(name):
        parse_response_policy(name, names)
        return
    elif name not in POLICIES:
        allowed = [*POLICIES, *names]
        raise ConfigError(f"unknown policy {name!r}{nearest(name, allowed)}; allowed: {', '.join(allowed)}")
    if len(names) < 2:
        raise ConfigError(f"policy {name!r} chooses between candidates; the pool has only {names[0]!r}")
    if name in ("switcher", "untuned", *ROUTING_POLICIES) and len(names) > 10:
        raise ConfigError(f"policy {name!r}: a switcher chooses between at most 10 candidates; got {len(names)}")


def check_left_out(name: str, left_out: Sequence[str], names: Sequence[str]) -> None:
    """See that `switcher~pretrained` leaves out candidates, and not all of them.

    Raises:
        ConfigError: it does not.
    """
    for candidate in left_out:
        if candidate not in names:
            raise ConfigError(
                f"policy {name!r}: after ~ stands a candidate to leave out, got {candidate!r}"
                f"{nearest(candidate, list(names))}; allowed: {', '.join(names)}"
            )
    if len(set(left_out)) >= len(names):
        raise ConfigError(f"policy {name!r} leaves out every candidate")
    rule = split_name(name)[0]
    if rule in names or is_router(rule) or is_response_policy(rule):
        raise ConfigError(f"policy {name!r}: candidates are left out of segment policies only: random, switcher, "
                          "untuned, routing, segment-rand@γ")  # fmt: skip


def generate_stream(
    pool: Pool,
    queries: Iterable[Query | str],
    policy: str | AnyPolicy = "random",
    *,
    decoding: DecodingConfig | None = None,
    switcher: Switcher | None = None,
    seed: int = 0,
    max_rows: int = 64,
) -> Iterator[Trace]:
    """Like `generate`, but yields each trace as soon as it is finished, in no particular order."""
    chosen = make_policy(policy, pool, switcher=switcher) if isinstance(policy, str) else policy
    loop = make_loop(pool, chosen, decoding or DecodingConfig(), max_rows=max_rows)
    for row in loop.run(Row(pool, query, response_seed(seed, query.id)) for query in _queries(queries)):
        yield row.trace


def generate(
    pool: Pool,
    queries: Iterable[Query | str],
    policy: str | AnyPolicy = "random",
    *,
    decoding: DecodingConfig | None = None,
    switcher: Switcher | None = None,
    seed: int = 0,
    max_rows: int = 64,
) -> list[Trace]:
    """Write one response per query.

    Args:
        pool: the candidates.
        queries: plain strings (one user message each) or `Query` objects with unique ids.
        policy: a policy's name (`random`, `switcher`, a candidate's name, `baco-p@0.3`) or a policy object.
        decoding: lengths, temperature, first and last writer; the defaults are the method's.
        switcher: needed by the policies `switcher` and `untuned` (`Pool.load_switcher`).
        seed: run seed; a response depends on it and on the query's id, not on the other queries.
        max_rows: responses in flight.

    Returns:
        Traces in the queries' order. A query that does not fit the context has `finish == "too_long"` and no segments.

    Raises:
        ConfigError: the policy does not exist or does not fit the pool.
    """
    listed = list(_queries(queries))
    positions = {query.id: index for index, query in enumerate(listed)}
    if len(positions) < len(listed):
        raise ConfigError("two queries have the same id; ids must be unique")
    traces: list[Trace | None] = [None] * len(listed)
    for trace in generate_stream(
        pool, listed, policy, decoding=decoding, switcher=switcher, seed=seed, max_rows=max_rows
    ):
        traces[positions[trace.query.id]] = trace
    return [trace for trace in traces if trace is not None]


def decide(
    pool: Pool, switcher: Switcher, query: Query | str, segments: Sequence[tuple[str, str]] = ()
) -> dict[str, float]:
    """Which model next? The switcher's probability of each candidate.

    Args:
        query: what the user asked.
        segments: (candidate's name, text) of what has been written so far, in order.

    Returns:
        Probabilities by candidate name, in ladder order; they sum to 1.
    """
    check_switcher(switcher, pool)
    row = Row(pool, query if isinstance(query, Query) else Query.from_text(query), seed=0)
    for name, text in segments:
        if name not in pool.names:
            raise ConfigError(f"no candidate is called {name!r}; allowed: {', '.join(pool.names)}")
        writer = pool.index(name)
        ids = tuple(pool.candidates[writer].vocabulary.encode_text(text))
        row.append(Segment(writer, text, ids, "length"))
    scores = SwitcherPolicy(switcher).scores([row])[0].tolist()
    row.release([("switcher", switcher.engine)])
    return dict(zip(pool.names, scores, strict=True))


def response_seed(seed: int, query_id: str, sample: int = 0) -> int:
    """Seed of the row that answers a query in a run."""
    return derive_seed(seed, query_id, "response", sample)


def _queries(queries: Iterable[Query | str]) -> Iterator[Query]:
    if isinstance(queries, str):
        raise ConfigError("queries is one string; allowed: a list of strings or Query objects")
    for index, query in enumerate(queries):
        yield query if isinstance(query, Query) else Query.from_text(query, id=str(index))
