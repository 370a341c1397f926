"""Replicas on a Ray cluster of real processes: how they run tasks, die, and are refused."""

import functools
import itertools
import sys
from collections import Counter

import fake_workers
import pytest

from llama.parallel import actors
from llama.parallel.actors import ReplicaFailed, Replicas

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One machine of two made-up cores, for all tests of the file; another one may join it."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(actors)  # so that no worker has to import the package, and with it torch
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.cloudpickle.unregister_pickle_by_value(actors)
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def start():
    started = []

    def make(*args, **kwargs) -> Replicas:
        started.append(Replicas(*args, **kwargs))
        return started[-1]

    yield make
    for replicas in started:
        replicas.close()


def lines(n: int):
    return ({"line": i} for i in range(n))


def test_each_task_is_done_once_and_a_second_run_uses_the_same_processes(start):
    replicas = start(fake_workers.Echo, 2)
    first = list(replicas.results(fake_workers.made, lines(200)))
    assert Counter(result["line"] for result in first) == Counter(range(200))
    assert {result["made"] for result in first} == {"made"}
    second = list(replicas.results(functools.partial(int, 7), lines(50)))
    assert Counter(result["line"] for result in second) == Counter(range(50)) and second[0]["made"] == 7
    assert len({result["pid"] for result in first + second}) <= 2


def test_the_costliest_tasks_are_done_first(start):
    replicas = start(fake_workers.Echo, 1)
    found = replicas.results(fake_workers.made, ({"line": i} for i in range(6)), cost=lambda task: task["line"])
    assert [result["line"] for result in found] == [5, 4, 3, 2, 1, 0]


def test_a_killed_process_is_replaced_and_its_tasks_are_done_again(start, tmp_path):
    replicas = start(functools.partial(fake_workers.DiesOnce, str(tmp_path)), 1)
    found = list(replicas.results(fake_workers.made, lines(40)))
    assert Counter(result["line"] for result in found) == Counter(range(40))
    assert not any("error" in result for result in found)
    assert replicas.restarts == 1 and str(replicas) == "1 replica, 1 restart"


def test_a_task_that_three_workers_died_of_gets_an_error_and_no_other_task_does(start):
    replicas = start(fake_workers.Echo, 1)
    found = list(replicas.results(fake_workers.made, ({"line": i, "poison": i == 5} for i in range(20))))
    assert Counter(result["line"] for result in found) == Counter(range(20))
    failed = {result["line"]: result["error"] for result in found if "error" in result}
    assert failed.keys() == {5} and failed[5].startswith("its worker died 3 times, the last time of: ActorDiedError")
    assert replicas.restarts == 3


def test_an_exception_of_the_first_replica_is_raised(start, capsys):
    with pytest.raises(FileNotFoundError, match="ckpt_dir /nowhere does not exist"):
        start(fake_workers.cannot_start, 1)
    assert "a replica cannot start (on " in capsys.readouterr().err


def test_a_replica_whose_process_dies_while_it_starts_is_tried_three_times(start, capsys):
    with pytest.raises(ReplicaFailed, match="no replica is left; the last one failed to start: ActorDiedError"):
        start(fake_workers.dies_while_starting, 1)
    assert capsys.readouterr().err.count("a replica died and is started again") == 2


def test_a_run_that_cannot_begin_is_an_error(start):
    replicas = start(fake_workers.Echo, 1)
    with pytest.raises(FileNotFoundError, match="ckpt_dir /nowhere does not exist"):
        list(replicas.results(fake_workers.cannot_start, lines(3)))


def test_replicas_that_differ_are_refused(start):
    with pytest.raises(ValueError, match=r"the replica on .* differs from the others: model is \d+, and not \d+"):
        unsure = start(fake_workers.Unsure, 2)
        list(unsure.results(fake_workers.made, ({"line": i} for i in itertools.count())))
    unsure.close()
    with pytest.raises(ValueError, match="package is 1, and not 2: expected the same everywhere"):
        start(fake_workers.Echo, 1, expected={"package": 2})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"n": 3}, "the cluster has 2 CPU cores: 3 replicas of 1 rank need 3, at least one for each rank"),
        ({"n": 1, "size": 4}, "the cluster has 2 CPU cores: 1 replica of 4 ranks need 4"),
        ({"n": 1, "device": "cuda"}, "the cluster has 0 GPUs: 1 replica of 1 rank need 1, one for each rank"),
        ({"n": 0}, "replicas = 0: expected an integer of at least 1"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused_before_anything_starts(asked, message):
    with pytest.raises(ValueError, match=message):
        Replicas(fake_workers.cannot_start, **asked)


@pytest.mark.parametrize(
    ("machines", "n", "size", "share"),
    [
        ([{"CPU": 16}] * 8, 4, 1, 16),  # not 32, because no machine has so many
        ([{"CPU": 16}] * 2, None, 1, 16),
        ([{"CPU": 4}, {"CPU": 12}], None, 1, 6),
        ([{"CPU": 4}, {"CPU": 12}], 3, 2, 2),
        ([{"CPU": 2}, {"GPU": 8, "CPU": 32}], 4, 2, 1),
        ([{"GPU": 8, "CPU": 4}], 4, 2, 0),
    ],
)
def test_a_rank_gets_its_share_of_a_machine(machines, n, size, share, monkeypatch):
    replicas = Replicas.__new__(Replicas)
    replicas._n, replicas._size = n, size
    monkeypatch.setattr(Replicas, "_machines", lambda self: machines)
    replicas._bundle = replicas._resources(None)
    assert replicas._bundle["CPU"] == share
    assert replicas._n_that_fit() >= (n or 2)


def test_a_machine_that_joins_is_used_and_when_it_is_gone_others_do_its_tasks(start, cluster):
    replicas = start(fake_workers.Echo)  # as many as the cluster holds
    assert replicas.n_alive == 1
    found, pids, lost, is_over = [], set(), None, False
    machine = cluster.add_node(num_cpus=2)
    tasks = itertools.takewhile(lambda _: not is_over, ({"line": i} for i in itertools.count()))
    for result in replicas.results(fake_workers.made, tasks):
        found.append(result["line"])
        pids.add(result["pid"])
        if lost is None and len(pids) == 2:
            lost = len(found)
            cluster.remove_node(machine, allow_graceful=False)
        is_over = replicas.restarts == 1
    assert sorted(found) == list(range(len(found)))
    assert replicas.n_alive == 1 and "1 restart" in str(replicas)


def test_without_ray_the_error_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"need Ray, which is not installed: pip install '\.\[ray\]'"):
        actors.import_ray()


def test_an_old_ray_is_refused(monkeypatch):
    monkeypatch.setattr(ray, "__version__", "2.9.3")
    with pytest.raises(ImportError, match=r"Ray 2\.9\.3 is too old: expected 2\.40 or newer"):
        actors.import_ray()
