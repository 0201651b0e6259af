"""Run lists of pipeline steps without ranks: where each step waits for its partner, and where transfers overlap."""

from collections import deque

from fairseq_moe.parallel.schedule import Action, Recv, Send, Step


def stuck(lists: list[list[Step]], num_stages: int) -> list[Step]:
    """Run the lists in program order, each step waiting until it is done; return those at which ranks wait for ever.

    Like NCCL without buffers: a send is done together with its receive, whichever step of the partner comes first must
    be its counterpart, and tags are ignored. A pass whose input is not there, a message that is not made yet and a
    receive that gets another message than it names are errors of the lists, whatever waits for what.
    """
    place = [0] * len(lists)
    here: list[set[tuple[str, int, int]]] = [set() for _ in lists]  # kind, micro-batch, boundary
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(lists):
            while place[rank] < len(steps):
                step = steps[place[rank]]
                if isinstance(step, Action):
                    compute(step, rank, here[rank], num_stages, len(lists))
                else:
                    there = lists[step.peer][place[step.peer] :][:1]
                    if (
                        isinstance(step, Recv)
                        or not there
                        or not isinstance(there[0], Recv)
                        or there[0].peer != rank
                    ):
                        break  # a receive is done when its send's turn comes
                    message = (step.kind, step.micro_batch, step.boundary)
                    assert message in here[rank], f"{step} before it is computed"
                    assert message == (there[0].kind, there[0].micro_batch, there[0].boundary)
                    here[step.peer].add(message)
                    place[step.peer] += 1
                place[rank] += 1
                moved = True
    return [steps[at] for steps, at in zip(lists, place, strict=True) if at < len(steps)]


def compute(action: Action, rank: int, here: set[tuple[str, int, int]], num_stages: int, pipe: int) -> None:
    """Take what a pass needs, which must be there, and add what it makes. The loss lies behind the last boundary."""
    stage = action.chunk * pipe + rank
    before, after = stage - 1, stage
    if action.kind == "F":
        assert stage == 0 or ("F", action.micro_batch, before) in here, f"{action} without its input"
        made = {("F", action.micro_batch, after)}
    else:
        needed = ("F" if stage == num_stages - 1 else "B", action.micro_batch, after)
        assert needed in here, f"{action} without its gradient"
        made = {("B", action.micro_batch, before)}
    assert not made & here, f"{action} twice"
    here |= made


def makespan(lists: list[list[Step]], cost: dict[str, float], transfer: float = 0) -> float:
    """Time the lists on devices that compute in order and transfer beside it, in order too, on ONE channel per rank.

    A transfer begins when both partners have posted it, which each does when the passes before it in its list are done,
    and when the channels of both are free. A pass begins when the pass before it is done and its input is there.
    """
    place, clock, channel = [0] * len(lists), [0.0] * len(lists), [0.0] * len(lists)
    posted: list[deque[tuple[Step, float]]] = [deque() for _ in lists]
    arrived: dict[tuple[int, str, int, int], float] = {}  # rank, kind, micro-batch, chunk
    awaited = {
        (r, s.kind, s.micro_batch, s.chunk)
        for r, steps in enumerate(lists)
        for s in steps
        if isinstance(s, Recv)
    }
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(lists):
            while place[rank] < len(steps):
                step = steps[place[rank]]
                if isinstance(step, Action):
                    key = (rank, step.kind, step.micro_batch, step.chunk)
                    if key in awaited and key not in arrived:
                        break
                    clock[rank] = max(clock[rank], arrived.get(key, 0.0)) + cost[step.kind]
                else:
                    posted[rank].append((step, clock[rank]))
                place[rank] += 1
                moved = True
            while posted[rank] and isinstance(step := posted[rank][0][0], Send) and posted[step.peer]:
                other, time = posted[step.peer][0]
                if not isinstance(other, Recv) or other.peer != rank:
                    break
                end = max(time, posted[rank][0][1], channel[rank], channel[step.peer]) + transfer
                channel[rank] = channel[step.peer] = arrived[
                    step.peer, other.kind, other.micro_batch, other.chunk
                ] = end
                posted[rank].popleft()
                posted[step.peer].popleft()
                moved = True
    assert all(at == len(steps) for at, steps in zip(place, lists, strict=True)), "a rank waits for ever"
    return max(clock)
