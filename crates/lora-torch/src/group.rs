//! Ranks: processes that train together, each on a device and on examples of its own. Here they find each other, add up
//! tensors, and tell each other small things and why one of them ends. What they sum and when is the training loop's affair; so
//! is starting them, which launchers do (torchrun, Slurm, mpirun).
//!
//! All of it is libtorch's own `c10d`: its TCPStore, Gloo for tensors in host memory, NCCL for those of GPUs. Gloo is inside
//! libtorch, but c10d's header for it includes Gloo's headers, which no package of libtorch has. A build needs nothing beside
//! the wheel all the same: `cpp/group/names` declares the five classes that the header speaks of, pointers to which are all
//! that is handed on. Headers of a distribution's Gloo would not do: Debian's are years older than what libtorch 2.11 holds. For
//! NCCL the build needs its header, of libtorch's own version; where there is none, GPUs sum by copies in host memory.
//!
//! A process that ends closes its connections, which Gloo notices at once; GPUs would wait for ever, so that ranks meet by Gloo
//! before each of their sums. A rank that says why it ends ([`Group::fail`]) is heard within half a second. A collective that
//! has failed leaves the group useless: every later one fails too.

mod rendezvous;
mod store;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};
use rendezvous::Peer;
use store::{Store, Work};

/// How often a rank that waits asks whether another has failed.
const LISTENING: Duration = Duration::from_millis(500);
/// How long a rank stays for others that have not left, and how long it looks for the cause of a connection that closed.
const PARTING: Duration = Duration::from_secs(5);
/// What ranks append their failures to, as lines `rank<TAB>process<TAB>reason`.
const FAILURES: &str = "failures";

/// Where a process stands among those that train together, as launchers say it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number among all, from 0 (`RANK`).
    pub rank: usize,
    /// How many there are (`WORLD_SIZE`).
    pub ranks: usize,
    /// Its number among those on its machine, from 0 (`LOCAL_RANK`).
    pub local_rank: usize,
    /// How many there are on its machine (`LOCAL_WORLD_SIZE`).
    pub local_ranks: usize,
    /// The machine of rank 0, by name or number (`MASTER_ADDR`).
    pub address: String,
    /// The port there on which rank 0 or the launcher serves the store (`MASTER_PORT`).
    pub port: u16,
}

impl Place {
    /// Of a rank among so many, on a machine of its own or wherever: for what needs no others, such as a plan.
    pub fn new(rank: usize, ranks: usize) -> Self {
        Self { rank, ranks, local_rank: 0, local_ranks: 1, address: "localhost".into(), port: 29_500 }
    }
}

/// Processes that train together, as one of them sees it.
///
/// A value may be used by several threads, but the order of calls of [`sum`](Self::sum), [`exchange`](Self::exchange) and
/// [`wait_for_all`](Self::wait_for_all) must be the same in all ranks. Dropping it tells the others that this rank has left, and
/// waits for up to five seconds until they have too: all of them after a good end, after a failure the one that serves the store.
#[derive(Debug)]
pub struct Group {
    place: Place,
    limit: Duration,
    store: Store,
    /// What each rank said of itself, by rank, once all have come.
    peers: Vec<Option<Peer>>,
    /// How often each name was exchanged.
    said: Mutex<HashMap<String, u64>>,
    broken: AtomicBool,
    /// GPUs sum among themselves, rather than by copies in host memory.
    gpus: bool,
}

impl Group {
    /// Joins the others. Rank 0 serves the store at the place's address and port, unless torchrun does, which says so by
    /// `TORCHELASTIC_USE_AGENT_STORE`. Waits at most `limit` until all have come.
    ///
    /// Gloo's connections go over the network that leads to rank 0, over the loopback where all ranks are on one machine, and
    /// over that of `GLOO_SOCKET_IFNAME` where it is set.
    ///
    /// # Errors
    /// [`Error::Group`] for an address that leads nowhere, a port in use, ranks that did not come (named), numbers of ranks
    /// that differ, two ranks of one number and two ranks on one GPU; libtorch's own.
    pub fn join(place: &Place, device: Device, limit: Duration) -> Result<Self> {
        let Place { rank, ranks, local_rank, local_ranks, .. } = *place;
        if rank >= ranks || local_rank >= local_ranks || local_ranks > ranks {
            return Err(Error::Group(format!(
                "there is no rank {rank} of {ranks}, {local_rank} of {local_ranks} on its machine: RANK and LOCAL_RANK count from 0 and are below WORLD_SIZE and LOCAL_WORLD_SIZE"
            )));
        }
        let limit = limit.min(Duration::from_secs(365 * 24 * 3600));
        let end = Instant::now() + limit;
        let host = rendezvous::resolve(place)?;
        let mut group = Self {
            place: place.clone(),
            limit,
            store: rendezvous::open(place, host, limit)?,
            peers: vec![None; ranks],
            said: Mutex::default(),
            broken: AtomicBool::new(false),
            gpus: false,
        };
        let joined = group.meet_others(host, device, end).and_then(|()| group.connect(host, device, end));
        match joined {
            Ok(()) => Ok(group),
            Err(error) => {
                group.fail(&error.to_string());
                Err(error)
            }
        }
    }

    /// Waits until each rank has said what it is, and makes sure that they fit together.
    fn meet_others(&mut self, host: IpAddr, device: Device, end: Instant) -> Result<()> {
        let Place { rank, ranks, .. } = self.place;
        if self.explained(self.store.add(&format!("claims/{rank}"), 1))? > 1 {
            return Err(Error::Group(format!("two processes were started as rank {rank}: RANK must differ")));
        }
        self.explained(self.store.set(&format!("peers/{rank}"), &Peer::own(&self.place, host, device).to_bytes()))?;
        let mut peers = vec![None; ranks];
        let complete = self.until(end, || {
            for (rank, peer) in peers.iter_mut().enumerate().filter(|(_, peer)| peer.is_none()) {
                let said = self.explained(self.store.get(&format!("peers/{rank}")))?;
                *peer = said.and_then(|bytes| Peer::from_bytes(&bytes));
            }
            Ok(peers.iter().all(Option::is_some))
        })?;
        let missing = ranks_where(&peers, Option::is_none);
        self.peers = peers;
        if !complete {
            let limit = self.limit;
            return Err(Error::Group(format!(
                "{missing} of {ranks} did not come within {limit:?}; were they started, with the same MASTER_ADDR and MASTER_PORT?"
            )));
        }
        rendezvous::agree(&self.peers.iter().flatten().cloned().collect::<Vec<_>>())
    }

    /// Connects the ranks for tensors.
    fn connect(&mut self, host: IpAddr, device: Device, end: Instant) -> Result<()> {
        let Place { rank, ranks, .. } = self.place;
        let own = rendezvous::own_address(&self.place, host, &self.peers)?;
        // Whoever cannot listen says so before the others wait for its connection.
        self.explained(self.store.set(&format!("listens/{rank}"), &[]))?;
        let mut listen = vec![false; ranks];
        self.until(end + LISTENING, || {
            for (rank, listens) in listen.iter_mut().enumerate().filter(|(_, listens)| !**listens) {
                *listens = self.explained(self.store.get(&format!("listens/{rank}")))?.is_some();
            }
            Ok(!listen.contains(&false))
        })?;
        // All are there: what is left of the time may be less than connecting takes on a busy machine.
        let limit = end.saturating_duration_since(Instant::now()).max(Duration::from_secs(30));
        self.explained(self.store.connect(own, rank, ranks, limit))?;
        let Device::Cuda(index) = device else { return Ok(()) };
        match self.store.connect_gpus(index, rank, ranks) {
            Ok(()) => self.gpus = true,
            Err(error) => tracing::warn!("the GPUs sum in host memory, which is slower than NCCL: {error}"),
        }
        // All of them the same way; and NCCL connects by its first sum, which is better seen to fail here.
        let ways = self.exchange("gpus", &[self.gpus.into()])?;
        if let Some(other) = ways.iter().position(|way| *way != ways[0]) {
            return Err(Error::Group(format!(
                "of ranks 0 and {other} only one has NCCL: their builds must be the same"
            )));
        }
        self.sum(&Tensor::f_zeros([1], (Kind::Float, device))?)
    }

    /// Where this process stands.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Sums a contiguous tensor over all ranks, in place; of any shape, the same in all of them. The sum has the same bytes in
    /// every rank. It is done when this returns, and on a GPU the current stream goes on after it.
    ///
    /// # Errors
    /// [`Error::Group`] for a tensor that is not contiguous or of another type than f32, f64 and i64, for a rank that ended,
    /// which it names where it can, and where not all have come within the limit of [`join`](Self::join).
    pub fn sum(&self, tensor: &Tensor) -> Result<()> {
        let kind = tensor.f_kind()?;
        if !matches!(kind, Kind::Float | Kind::Double | Kind::Int64) || !tensor.is_contiguous() {
            return Err(Error::Group(format!(
                "ranks sum contiguous tensors of f32, f64 and i64, not this one of {kind:?} and shape {:?}",
                tensor.size()
            )));
        }
        if tensor.numel() == 0 {
            return Ok(());
        }
        let _turn = self.turn();
        let _no_gradients = tch::no_grad_guard();
        let sum = |tensor: &Tensor| {
            self.collective(tensor, self.limit, || format!("not all ranks came to a sum within {:?}", self.limit))
        };
        if tensor.device() == Device::Cpu {
            return sum(tensor);
        }
        if self.gpus {
            // A GPU would wait for ever for one whose process has ended; Gloo sees that at once.
            sum(&meeting()?)?;
            return sum(tensor);
        }
        let copy = tensor.f_to_device(Device::Cpu)?;
        sum(&copy)?;
        tensor.shallow_clone().f_copy_(&copy)?;
        Ok(())
    }

    /// What each rank said under `name`, by rank: small bytes, through the store. Names may be used again.
    ///
    /// # Errors
    /// [`Error::Group`] for ranks that said nothing within the limit of [`join`](Self::join), which are named, and for one
    /// that ended.
    pub fn exchange(&self, name: &str, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.exchange_within(name, bytes, self.limit)
    }

    /// Waits until all ranks are here, at most `limit`. Names may be used again.
    ///
    /// # Errors
    /// [`Error::Group`] for ranks that did not come, which are named, and for one that ended.
    pub fn wait_for_all(&self, name: &str, limit: Duration) -> Result<()> {
        self.exchange_within(name, &[], limit).map(|_| ())
    }

    fn exchange_within(&self, name: &str, bytes: &[u8], limit: Duration) -> Result<Vec<Vec<u8>>> {
        if let Some(told) = self.failure() {
            return Err(Error::Group(ended(told)));
        }
        let mut said = self.turn();
        let turn = said.entry(name.to_owned()).or_default();
        *turn += 1;
        let (&Place { rank, ranks, .. }, turn) = (&self.place, *turn);
        let key = |turn: u64, rank: usize| format!("said/{name}/{turn}/{rank}");
        self.explained(self.store.set(&key(turn, rank), bytes))?;
        // Whoever meets the others here once more has read all of the time before the last.
        if turn > 2 {
            self.explained(self.store.delete(&key(turn - 2, rank)))?;
        }
        // A meeting by Gloo, which sees at once when a process has ended.
        let silent = || {
            let heard: Vec<bool> =
                (0..ranks).map(|rank| matches!(self.store.get(&key(turn, rank)), Ok(Some(_)))).collect();
            format!("{} of {ranks} did not come to `{name}` within {limit:?}", ranks_where(&heard, |&heard| !heard))
        };
        self.collective(&meeting()?, limit, silent)?;
        (0..ranks)
            .map(|rank| {
                let found = self.explained(self.store.get(&key(turn, rank)))?;
                found.ok_or_else(|| Error::Group(format!("rank {rank} came to another meeting than `{name}`")))
            })
            .collect()
    }

    /// Tells the others why this rank ends, so that their errors can name it. Never fails: if nobody hears it, they notice
    /// that its connections close.
    pub fn fail(&self, reason: &str) {
        let line = format!("{}\t{}\t{}\n", self.place.rank, std::process::id(), reason.replace(['\n', '\t'], " "));
        if let Err(error) = self.store.append(FAILURES, line.as_bytes()) {
            tracing::debug!("the other ranks cannot be told: {error}");
        }
    }

    /// The first failure that another rank told, and its number.
    pub fn failure(&self) -> Option<(usize, String)> {
        self.told().ok()?
    }

    /// The same, and whether the store answers.
    fn told(&self) -> Result<Option<(usize, String)>> {
        let told = self.store.get(FAILURES)?.unwrap_or_default();
        let told = String::from_utf8_lossy(&told).into_owned();
        Ok(told.lines().find_map(|line| {
            let [rank, process, reason] = line.split('\t').collect::<Vec<_>>().try_into().ok()?;
            let rank = rank.parse().ok()?;
            // Two processes may have been started as one rank.
            let own = (rank, process.parse()) == (self.place.rank, Ok(std::process::id()));
            (!own).then(|| (rank, reason.to_owned()))
        }))
    }

    /// Which ranks are left after one has ended, in order; each that is left calls it. Waits until all have said that they are
    /// there, but for those that are known to be gone, and no longer than `limit`. Where the store is gone, rank 0 is with it.
    pub fn roll_call(&self, limit: Duration) -> Vec<usize> {
        let Place { rank, ranks, .. } = self.place;
        let end = Instant::now() + limit;
        let without_first = || (1..ranks.max(2)).collect();
        if self.store.set(&format!("left over/{rank}"), &[]).is_err() {
            return without_first();
        }
        let mut here = vec![false; ranks];
        loop {
            for (rank, here) in here.iter_mut().enumerate().filter(|(_, here)| !**here) {
                match self.store.get(&format!("left over/{rank}")) {
                    Ok(found) => *here = found.is_some(),
                    Err(_) => return without_first(),
                }
            }
            let complete = here.iter().zip(&self.peers).all(|(&here, peer)| here || self.is_gone(peer));
            if complete || Instant::now() >= end {
                return here.iter().enumerate().filter(|(_, here)| **here).map(|(rank, _)| rank).collect();
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// The right to begin a collective, as those of two threads would come in any order.
    fn turn(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sums a tensor in place, and looks meanwhile whether another rank has failed; `late` says who is missing after the limit.
    fn collective(&self, tensor: &Tensor, limit: Duration, late: impl Fn() -> String) -> Result<()> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(Error::Group("the ranks have lost each other; only a new run joins them again".into()));
        }
        // c10d's own limit comes after ours, which can say more.
        let work = self.store.sum(tensor, limit.saturating_add(Duration::from_secs(60)));
        let done = work.and_then(|work| self.wait(work, limit, &late));
        self.explained(done).inspect_err(|_| self.broken.store(true, Ordering::Relaxed))
    }

    /// Waits for work: [`Error::Torch`] as it failed, [`Error::Group`] where the cause is known.
    fn wait(&self, work: Work, limit: Duration, late: &impl Fn() -> String) -> Result<()> {
        let (begin, mut listened, mut gone) = (Instant::now(), Instant::now(), None);
        while !work.is_done()? {
            if listened.elapsed() > LISTENING.min(limit) {
                listened = Instant::now();
                let cause = self.failure().map(ended);
                // What Gloo sees by itself, and NCCL does not. Once is not enough: one may end when its own part is done.
                let before = std::mem::replace(&mut gone, self.gone());
                let cause = cause.or_else(|| before.map(|ranks| format!("{ranks} ended without a word")));
                let cause = cause.or_else(|| (begin.elapsed() > limit).then(late));
                if let Some(cause) = cause {
                    self.store.abandon();
                    return Err(Error::Group(cause));
                }
            }
            sleep((begin.elapsed() / 8).clamp(Duration::from_micros(20), Duration::from_millis(2)));
        }
        work.finish()
    }

    /// A failure of c10d as one that says which rank ended, where that can be found out within some seconds. The others are
    /// told.
    fn explained<T>(&self, done: Result<T>) -> Result<T> {
        let error = match done {
            Err(error @ Error::Torch(_)) => error,
            other => return other,
        };
        let begin = Instant::now();
        let words = rendezvous::short(&error);
        loop {
            let told = self.told();
            if let Ok(Some(told)) = told {
                return Err(Error::Group(ended(told)));
            }
            let cause = match (told, self.gone()) {
                (_, Some(gone)) => format!("{gone} ended without a word ({words})"),
                (Err(_), None) if begin.elapsed() > LISTENING => {
                    format!("{} ended or cannot be reached any more ({words})", rendezvous::server())
                }
                _ if begin.elapsed() < PARTING => {
                    sleep(Duration::from_millis(50));
                    continue;
                }
                _ => format!("{} ended or cannot be reached any more ({words})", self.meant_by(&words)),
            };
            self.fail(&cause);
            return Err(Error::Group(cause));
        }
    }

    /// Of whom c10d speaks, as far as addresses tell.
    fn meant_by(&self, words: &str) -> String {
        let meant = |peer: &Option<Peer>| peer.as_ref().is_some_and(|peer| peer.is_meant_by(words));
        let ranks = ranks_where(&self.peers, meant);
        match self.peers.iter().filter(|peer| meant(peer)).count() {
            0 => "another rank".into(),
            1 => ranks,
            _ => format!("one of {ranks}"),
        }
    }

    /// The ranks that are known to have ended, in words.
    fn gone(&self) -> Option<String> {
        Some(ranks_where(&self.peers, |peer| self.is_gone(peer))).filter(|gone| !gone.is_empty())
    }

    /// Whether a rank is known to have ended.
    fn is_gone(&self, peer: &Option<Peer>) -> bool {
        let own = self.peers.get(self.place.rank).and_then(Option::as_ref);
        peer.as_ref().zip(own).is_some_and(|(peer, own)| peer.is_gone(own))
    }

    /// Asks until it is so, or until a time: whether it is so then.
    fn until(&self, end: Instant, mut is_so: impl FnMut() -> Result<bool>) -> Result<bool> {
        let mut pause = Duration::from_millis(2);
        loop {
            if is_so()? {
                return Ok(true);
            }
            if let Some(told) = self.failure() {
                return Err(Error::Group(ended(told)));
            }
            if Instant::now() >= end {
                return Ok(false);
            }
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    /// Whether every other rank that came has left or ended, or the store has, which is the last to leave.
    fn is_alone(&self) -> bool {
        self.peers.iter().enumerate().all(|(rank, peer)| {
            rank == self.place.rank
                || peer.is_none()
                || self.is_gone(peer)
                || !matches!(self.store.get(&format!("left/{rank}")), Ok(None))
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The store may be gone already.
        let _ = self.store.set(&format!("left/{}", self.place.rank), &[]);
        let well = !*self.broken.get_mut() && matches!(self.store.get(FAILURES), Ok(None));
        // After a failure only the store is needed, from which the others read it. Else they may be behind by what is still on
        // its way to them, which a connection that closes could cut off.
        if !well && !rendezvous::serves(&self.place) {
            return;
        }
        let begin = Instant::now();
        while !self.is_alone() && begin.elapsed() < PARTING {
            sleep(Duration::from_millis(2));
        }
    }
}

/// What is summed to meet.
fn meeting() -> Result<Tensor> {
    Ok(Tensor::f_zeros([1], (Kind::Int64, Device::Cpu))?)
}

/// What another rank told of its end.
fn ended((rank, reason): (usize, String)) -> String {
    format!("rank {rank} ended: {reason}")
}

/// "rank 1", or "ranks 1, 3": those of which something is so; empty for none.
fn ranks_where<T>(all: &[T], is_so: impl Fn(&T) -> bool) -> String {
    let ranks: Vec<String> =
        all.iter().enumerate().filter(|(_, one)| is_so(one)).map(|(rank, _)| rank.to_string()).collect();
    let mut words = String::new();
    if !ranks.is_empty() {
        let _ = write!(words, "rank{} {}", if ranks.len() == 1 { "" } else { "s" }, ranks.join(", "));
    }
    words
}
