//! Which rank a process is, as launchers say it in its environment: torchrun and Kubernetes' PyTorchJob by `RANK` and
//! `WORLD_SIZE`, Slurm's `srun` and Open MPI's `mpirun` by names of their own.

use std::collections::HashMap;
use std::env;

use super::Place;
use crate::{Error, Result};

/// The port where none is said: PyTorch's.
const PORT: u16 = 29_500;

/// A launcher's names of the rank, how many there are, and both among those on one machine.
struct Launcher {
    rank: &'static str,
    ranks: &'static str,
    local_rank: &'static str,
    local_ranks: &'static str,
    /// It starts programs of which each is to train alone as well, so that only `MASTER_ADDR` tells.
    any_program: bool,
}

const LAUNCHERS: [Launcher; 3] = [
    Launcher {
        rank: "RANK",
        ranks: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        local_ranks: "LOCAL_WORLD_SIZE",
        any_program: false,
    },
    Launcher {
        rank: "SLURM_PROCID",
        ranks: "SLURM_NTASKS",
        local_rank: "SLURM_LOCALID",
        local_ranks: "SLURM_NTASKS_PER_NODE",
        any_program: true,
    },
    Launcher {
        rank: "OMPI_COMM_WORLD_RANK",
        ranks: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_ranks: "OMPI_COMM_WORLD_LOCAL_SIZE",
        any_program: true,
    },
];

/// Where this process stands among those that a launcher started to train together; `None` where it trains alone.
///
/// # Errors
/// [`Error::Launch`] for variables that are no numbers or do not go together, and where one is missing.
pub fn place() -> Result<Option<Place>> {
    of(&env::vars().collect())
}

fn of(variables: &HashMap<String, String>) -> Result<Option<Place>> {
    let address = variables.get("MASTER_ADDR");
    for launcher in &LAUNCHERS {
        if launcher.any_program && address.is_none() {
            continue;
        }
        let (Some(rank), Some(ranks)) = (number(variables, launcher.rank)?, number(variables, launcher.ranks)?) else {
            continue;
        };
        if ranks < 2 {
            return Ok(None);
        }
        let missing = |name: &str, what: &str| Error::Launch {
            reason: format!(
                "{} is {ranks}, but {name} is not set: {what}; take {} out of the environment to train alone",
                launcher.ranks, launcher.ranks
            ),
        };
        let address = address.ok_or_else(|| missing("MASTER_ADDR", "the name or address of rank 0's machine"))?;
        let port = number(variables, "MASTER_PORT")?.unwrap_or(usize::from(PORT));
        let port = u16::try_from(port)
            .map_err(|_| Error::Launch { reason: format!("MASTER_PORT is {port}, which is no port: at most 65535") })?;
        if rank >= ranks {
            let reason = format!(
                "{} is {rank}, but {} is {ranks}: ranks count from 0 to {}",
                launcher.rank,
                launcher.ranks,
                ranks - 1
            );
            return Err(Error::Launch { reason });
        }
        // Without a word of machines each rank has one of its own, unless rank 0's is this one for sure.
        let one_machine = matches!(address.as_str(), "localhost" | "127.0.0.1" | "::1");
        let alone = if one_machine { (rank, ranks) } else { (0, 1) };
        let local_rank = number(variables, launcher.local_rank)?;
        let local_ranks = number(variables, launcher.local_ranks)?;
        let (local_rank, local_ranks) = match (local_rank, local_ranks) {
            (Some(rank), Some(ranks)) => (rank, ranks),
            (Some(rank), None) => (rank, (rank + 1).max(alone.1)),
            _ => alone,
        };
        return Ok(Some(Place { rank, ranks, local_rank, local_ranks, address: address.clone(), port }));
    }
    Ok(None)
}

fn number(variables: &HashMap<String, String>, name: &str) -> Result<Option<usize>> {
    let Some(text) = variables.get(name).map(|text| text.trim()).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let reason = || format!("{name} is `{text}`, expected a number; the launcher sets it");
    text.parse().map(Some).map_err(|_| Error::Launch { reason: reason() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> Result<Option<Place>> {
        let pairs = text.split_whitespace().map(|pair| pair.split_once('=').unwrap());
        of(&pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    fn at([rank, ranks, local_rank, local_ranks]: [usize; 4], address: &str, port: u16) -> Option<Place> {
        Some(Place { rank, ranks, local_rank, local_ranks, address: address.to_owned(), port })
    }

    #[test]
    fn each_launcher_is_understood() {
        let found = |text: &str| told(text).unwrap();
        let torchrun = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=node0 MASTER_PORT=1234";
        assert_eq!(found(torchrun), at([3, 4, 1, 2], "node0", 1234));
        // A pod of a PyTorchJob has a machine to itself.
        let pod = "RANK=2 WORLD_SIZE=3 MASTER_ADDR=job-master-0 MASTER_PORT=23456";
        assert_eq!(found(pod), at([2, 3, 0, 1], "job-master-0", 23456));
        let slurm = "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=1 MASTER_ADDR=node7";
        assert_eq!(found(slurm), at([1, 2, 1, 2], "node7", PORT));
        let mpi = "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=2 MASTER_ADDR=localhost";
        assert_eq!(found(mpi), at([0, 2, 0, 2], "localhost", PORT));
        assert_eq!(found("RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1"), at([1, 2, 1, 2], "127.0.0.1", PORT));
    }

    #[test]
    fn a_process_without_others_trains_alone() {
        for text in [
            "",
            "RANK=0 WORLD_SIZE=1",
            "SLURM_PROCID=1 SLURM_NTASKS=4",
            "MASTER_ADDR=node0",
            "RANK=0",
            "RANK= WORLD_SIZE=",
        ] {
            assert_eq!(told(text).unwrap(), None, "{text}");
        }
    }

    #[test]
    fn what_does_not_go_together_is_named() {
        for (text, parts) in [
            ("RANK=0 WORLD_SIZE=2", ["WORLD_SIZE is 2", "MASTER_ADDR is not set"]),
            ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a", ["RANK is 2", "from 0 to 1"]),
            ("RANK=x WORLD_SIZE=2 MASTER_ADDR=a", ["RANK is `x`", "a number"]),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=70000", ["MASTER_PORT is 70000", "65535"]),
        ] {
            let error = told(text).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{text}: {error}");
        }
    }
}
