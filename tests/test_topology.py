import pytest

from distfit.errors import InputError
from distfit.topology import Topology, from_environment


def test_one_process_of_one_without_a_launcher():
    topology = from_environment({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
    assert (topology.rank, topology.size, topology.num_replicas, topology.is_chief) == (0, 1, 1, True)


@pytest.mark.parametrize(
    "environment",
    [
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"},
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        {
            "SLURM_PROCID": "3",
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        },
    ],
    ids=["openmpi", "horovodrun", "mpich", "srun"],
)
def test_each_launchers_names(environment):
    topology = from_environment(environment)
    assert (topology.rank, topology.size, topology.local_rank, topology.local_size) == (3, 4, 1, 2)


def test_slurms_nodes_may_have_different_numbers_of_tasks():
    step = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "1,2"}
    topology = from_environment({**step, "SLURM_NODEID": "1"})
    assert (topology.local_rank, topology.local_size) == (1, 2)
    first = from_environment({**step, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert (first.local_rank, first.local_size) == (0, 1)


def test_replicas_are_numbered_over_the_job():
    topology = Topology(rank=2, size=3).with_replicas(4)
    assert (topology.num_replicas, topology.first_replica, topology.is_chief) == (12, 8, False)


@pytest.mark.parametrize(
    "facts", [{"rank": 2, "size": 2}, {"rank": -1}, {"local_rank": 1}, {"replicas_per_process": 0}]
)
def test_impossible_places_are_refused(facts):
    with pytest.raises(InputError, match="Expected"):
        Topology(**facts)


def test_a_launchers_variable_that_is_no_number_is_named():
    with pytest.raises(InputError, match=r"HOROVOD_SIZE.*'many'"):
        from_environment({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "many"})
