//! How the ranks find each other: the address, who serves the store there, and what each says of itself first.

use std::collections::HashSet;
use std::ffi::c_int;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::os::fd::IntoRawFd;
use std::time::Duration;

use tch::Device;

use super::Place;
use super::store::Store;
use crate::{Error, Result};

/// torchrun's way to say that it serves the store itself.
const AGENT_SERVES: &str = "TORCHELASTIC_USE_AGENT_STORE";

/// Names of networks that Gloo is to use, separated by commas.
const GLOO_NETWORKS: &str = "GLOO_SOCKET_IFNAME";

fn launcher_serves() -> bool {
    std::env::var(AGENT_SERVES).as_deref() == Ok("True")
}

/// Whether this process serves the store.
pub(super) fn serves(place: &Place) -> bool {
    place.rank == 0 && !launcher_serves()
}

/// Who serves the store, in words.
pub(super) fn server() -> &'static str {
    if launcher_serves() { "the launcher" } else { "rank 0" }
}

/// The address of the store as a number, so that all processes of a machine mean the same one where a name has several.
pub(super) fn resolve(place: &Place) -> Result<IpAddr> {
    let unknown = |reason: String| {
        Error::Group(format!(
            "the address `{}` of rank 0 cannot be used: {reason}; MASTER_ADDR names the machine of rank 0",
            place.address
        ))
    };
    let found: Vec<SocketAddr> =
        (place.address.as_str(), place.port).to_socket_addrs().map_err(|error| unknown(error.to_string()))?.collect();
    let first = found.iter().find(|address| address.is_ipv4()).or(found.first());
    first.map(SocketAddr::ip).ok_or_else(|| unknown("no machine has this name".into()))
}

/// Opens the store, which this process serves or another one.
pub(super) fn open(place: &Place, host: IpAddr, limit: Duration) -> Result<Store> {
    let listener = if serves(place) { Some(listen(place, host)?) } else { None };
    // Of each attempt its own, as a launcher that starts the ranks again may keep the store.
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let prefix = format!("lora/{}/{}", variable("TORCHELASTIC_RUN_ID"), variable("TORCHELASTIC_RESTART_COUNT"));
    Store::open(host, place.port, listener, limit, &prefix).map_err(|error| {
        Error::Group(format!(
            "{} could not be reached at {} (MASTER_ADDR, MASTER_PORT) within {limit:?}: {}",
            server(),
            SocketAddr::new(host, place.port),
            short(&error)
        ))
    })
}

/// A socket for the store. Nobody outside the machine can reach it where all ranks are on the machine.
fn listen(place: &Place, host: IpAddr) -> Result<c_int> {
    let everywhere = match host {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let local = host.is_loopback() && place.local_ranks == place.ranks;
    let listener = TcpListener::bind((if local { host } else { everywhere }, place.port));
    listener.map(IntoRawFd::into_raw_fd).map_err(|error| {
        let port = place.port;
        Error::Group(match error.kind() {
            ErrorKind::AddrInUse => format!(
                "port {port} of this machine is in use, by another run perhaps; set MASTER_PORT to a free one, the same for all ranks"
            ),
            _ => format!("rank 0 cannot listen on port {port}: {error}; MASTER_PORT names another"),
        })
    })
}

/// The address that this rank listens on for the others; `None` where a variable of Gloo's own says it.
pub(super) fn own_address(place: &Place, host: IpAddr, peers: &[Option<Peer>]) -> Result<Option<IpAddr>> {
    if let Some(networks) = std::env::var(GLOO_NETWORKS).ok().filter(|networks| !networks.is_empty()) {
        return known_networks(&networks).map(|()| None);
    }
    // Whatever launchers say of machines: the loopback is of those who share it.
    let networks: HashSet<_> = peers.iter().map(|peer| peer.as_ref().map(|peer| &peer.network)).collect();
    if networks.len() == 1 {
        return Ok(Some(Ipv4Addr::LOCALHOST.into()));
    }
    let address = address_towards(host, place.port)
        .map_err(|error| Error::Group(format!("no network leads to rank 0 at {host}: {error}")))?;
    if address.is_loopback() {
        return Err(Error::Group(format!(
            "`{}` leads to this machine alone ({host}), and there are ranks on others: set MASTER_ADDR to an address that they reach, or {GLOO_NETWORKS} to the network between them",
            place.address
        )));
    }
    Ok(Some(address))
}

/// The address of the network by which another is reached, which the name of a machine need not lead to. Nothing is sent.
fn address_towards(host: IpAddr, port: u16) -> std::io::Result<IpAddr> {
    let any: IpAddr = if host.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((host, port))?;
    Ok(socket.local_addr()?.ip())
}

/// That this machine has the networks that Gloo is to use.
fn known_networks(wanted: &str) -> Result<()> {
    let Ok(folder) = std::fs::read_dir("/sys/class/net") else { return Ok(()) };
    let mut names: Vec<String> =
        folder.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    match wanted.split(',').find(|wanted| !names.iter().any(|name| name == wanted)) {
        None => Ok(()),
        Some(unknown) => Err(Error::Group(format!(
            "{GLOO_NETWORKS} names the network `{unknown}`, and this machine has {}",
            names.join(", ")
        ))),
    }
}

/// What a rank says of itself.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Peer {
    ranks: usize,
    /// Of one boot of one machine, and of one view of its processes and of its network.
    machine: String,
    network: String,
    /// By which it reaches rank 0, and others it.
    address: String,
    process: u32,
    pub(super) host: String,
    device: String,
    /// Of a GPU; empty for the CPU, which ranks may share.
    unit: String,
}

impl Peer {
    pub(super) fn own(place: &Place, host: IpAddr, device: Device) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let view = |of: &str| {
            let space = std::fs::read_link(format!("/proc/self/ns/{of}")).unwrap_or_default();
            format!("{} {}", read("/proc/sys/kernel/random/boot_id"), space.display())
        };
        let (device, unit) = match device {
            Device::Cuda(index) => (format!("cuda:{index}"), crate::device::uuid(index).unwrap_or_default()),
            _ => ("cpu".into(), String::new()),
        };
        Self {
            ranks: place.ranks,
            machine: view("pid"),
            network: view("net"),
            address: address_towards(host, place.port).map(|address| address.to_string()).unwrap_or_default(),
            process: std::process::id(),
            host: read("/proc/sys/kernel/hostname"),
            device,
            unit,
        }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let Self { ranks, machine, network, address, process, host, device, unit } = self;
        format!("{ranks}\n{machine}\n{network}\n{address}\n{process}\n{host}\n{device}\n{unit}").into_bytes()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let [ranks, machine, network, address, process, host, device, unit] =
            text.split('\n').collect::<Vec<_>>().try_into().ok()?;
        let [machine, network, address] = [machine, network, address].map(str::to_owned);
        let [host, device, unit] = [host, device, unit].map(str::to_owned);
        let (ranks, process) = (ranks.parse().ok()?, process.parse().ok()?);
        Some(Self { ranks, machine, network, address, process, host, device, unit })
    }

    /// Whether c10d speaks of a connection with it, or with another of its machine.
    pub(super) fn is_meant_by(&self, words: &str) -> bool {
        !self.address.is_empty() && words.contains(&format!("[{}]", self.address))
    }

    /// Whether its process has ended, as far as this one, of the same machine, can see.
    pub(super) fn is_gone(&self, own: &Peer) -> bool {
        if self.machine != own.machine {
            return false;
        }
        let state = std::fs::read_to_string(format!("/proc/{}/stat", self.process));
        // The name of the program, in parentheses, may hold anything.
        state.map_or(true, |state| state.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X'])))
    }
}

/// That the ranks say the same number of ranks, and that none shares a GPU with another.
pub(super) fn agree(peers: &[Peer]) -> Result<()> {
    let all = peers.len();
    if let Some((rank, peer)) = peers.iter().enumerate().find(|(_, peer)| peer.ranks != all) {
        return Err(Error::Group(format!(
            "rank {rank} (on {}) was started as one of {} and others as one of {all}: WORLD_SIZE must be the same for all",
            peer.host, peer.ranks
        )));
    }
    for (rank, peer) in peers.iter().enumerate().filter(|(_, peer)| !peer.unit.is_empty()) {
        if let Some(other) = peers[..rank].iter().position(|other| other.unit == peer.unit) {
            return Err(Error::Group(format!(
                "ranks {other} and {rank} are on the same GPU ({} of {}): each needs its own; start as many ranks on a machine as it has GPUs, and let `device` be auto or cuda",
                peer.device, peer.host
            )));
        }
    }
    Ok(())
}

/// The first line of a failure in c10d, without its stack and without the mark that libtorch's errors bear.
pub(super) fn short(error: &Error) -> String {
    let text = match error {
        Error::Torch(text) => text.clone(),
        other => other.to_string(),
    };
    text.trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(ranks: usize, address: &str) -> Place {
        Place { rank: 1, ranks, local_rank: 0, local_ranks: 1, address: address.into(), port: 29_500 }
    }

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn on_gpu(unit: &str, host: &str) -> Peer {
        let own = Peer::own(&place(2, "localhost"), HERE, Device::Cpu);
        Peer { device: "cuda:0".into(), unit: unit.into(), host: host.into(), network: host.into(), ..own }
    }

    #[test]
    fn a_rank_reads_what_another_says_of_itself() {
        let own = Peer::own(&place(2, "localhost"), HERE, Device::Cpu);
        assert!(own.unit.is_empty() && !own.machine.is_empty() && !own.is_gone(&own));
        assert_eq!(Peer::from_bytes(&own.to_bytes()), Some(own));
        for other in [b"2\nx".as_slice(), b"", b"\xff", b"a\nb\nc\nd\n1\nf\ng\nh"] {
            assert_eq!(Peer::from_bytes(other), None);
        }
    }

    #[test]
    fn each_rank_needs_a_gpu_of_its_own_and_may_share_a_cpu() {
        let (one, other) = (on_gpu("aa", "left"), on_gpu("bb", "right"));
        agree(&[one.clone(), other.clone()]).unwrap();
        agree(&[on_gpu("", "left"), on_gpu("", "left")]).unwrap();
        let error = agree(&[one.clone(), other]).and(agree(&[one.clone(), one.clone()])).unwrap_err().to_string();
        assert!(error.contains("ranks 0 and 1 are on the same GPU (cuda:0 of left)"), "{error}");
        let error = agree(&[one.clone(), one.clone(), one]).unwrap_err().to_string();
        assert!(error.contains("rank 0 (on left)") && error.contains("one of 2 and others as one of 3"), "{error}");
    }

    #[test]
    fn a_process_that_has_ended_is_known_to_be_gone_where_it_can_be_seen() {
        let own = Peer::own(&place(2, "localhost"), HERE, Device::Cpu);
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let peer = Peer { process: child.id(), ..own.clone() };
        assert!(!peer.is_gone(&own));
        child.kill().unwrap();
        // Nobody has waited for it: it is there still, as one that has ended.
        while !peer.is_gone(&own) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.wait().unwrap();
        assert!(peer.is_gone(&own));
        assert!(!Peer { machine: "another".into(), ..peer }.is_gone(&own));
    }

    #[test]
    fn ranks_connect_over_the_network_that_leads_to_rank_0() {
        if std::env::var_os(GLOO_NETWORKS).is_some() {
            return;
        }
        let (loopback, far) = (HERE, [Some(on_gpu("", "left")), Some(on_gpu("", "right"))]);
        let near = [far[0].clone(), far[0].clone()];
        assert_eq!(own_address(&place(2, "localhost"), loopback, &near).unwrap(), Some(loopback));
        let error = own_address(&place(2, "localhost"), loopback, &far).unwrap_err().to_string();
        assert!(error.contains("MASTER_ADDR") && error.contains("GLOO_SOCKET_IFNAME"), "{error}");
        known_networks("lo").unwrap();
        let error = known_networks("lo,no-such-network").unwrap_err().to_string();
        assert!(error.contains("`no-such-network`, and this machine has ") && error.contains("lo"), "{error}");
        assert!(far[0].as_ref().unwrap().is_meant_by("Connection closed by peer [127.0.0.1]:38079"));
        assert!(!far[0].as_ref().unwrap().is_meant_by("Connection closed by peer [127.0.0.11]:38079"));
    }
}
