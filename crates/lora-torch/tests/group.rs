//! Ranks as real processes: this program starts itself again, once for each rank, as the test `a_rank`, which does what
//! `LORA_TEST_DOES` names and prints what came of it.

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lora_torch::group::{Group, Place};
use lora_torch::tch::{Device, Kind, Tensor};

/// For all that should come to an end soon: two busy cores may take long.
const LONG: Duration = Duration::from_secs(120);

/// A port that nothing listens on now, of those that the system gives no connection by itself, as it might do until a rank
/// listens there.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(131);
    let ports = std::iter::repeat_with(|| 20_000 + first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000);
    let mut ports = ports.map(|port| u16::try_from(port).unwrap());
    ports.find(|&port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()).unwrap()
}

/// A rank that is running; it does not outlive the test.
struct Rank {
    process: Child,
    /// Read as they are written: nobody writes into a full pipe.
    output: JoinHandle<String>,
    errors: JoinHandle<String>,
}

fn all_of(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

impl Rank {
    fn start(does: &str, rank: usize, ranks: usize, port: u16, limit: Duration) -> Self {
        Self::start_with(does, rank, ranks, port, limit, &[])
    }

    fn start_with(
        does: &str,
        rank: usize,
        ranks: usize,
        port: u16,
        limit: Duration,
        variables: &[(&str, &str)],
    ) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["a_rank", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        command.env("LORA_TEST_DOES", does).env("LORA_TEST_LIMIT", limit.as_millis().to_string());
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", ranks.to_string());
        command.env("MASTER_PORT", port.to_string()).env("MASTER_ADDR", "localhost");
        command.env_remove("TORCHELASTIC_USE_AGENT_STORE").env("OMP_NUM_THREADS", "1").envs(variables.iter().copied());
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let output = all_of(process.stdout.take().unwrap());
        let errors = all_of(process.stderr.take().unwrap());
        Self { process, output, errors }
    }

    fn start_all(does: &str, ranks: usize) -> Vec<Self> {
        let port = free_port();
        (0..ranks).map(|rank| Self::start(does, rank, ranks, port, LONG)).collect()
    }

    /// What it printed after `said: `, once it has ended. libtorch's own words are not for those who only see ours.
    fn said(mut self) -> String {
        let begin = Instant::now();
        while self.process.try_wait().unwrap().is_none() {
            if begin.elapsed() > 2 * LONG {
                self.end();
                panic!("it does not end");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let (output, errors) = (self.output.join().unwrap(), self.errors.join().unwrap());
        let said = output.split_once("said: ").and_then(|(_, said)| said.split_once('\n'));
        assert!(!errors.contains("c10d") && self.process.wait().unwrap().success(), "{output}{errors}");
        said.unwrap_or_else(|| panic!("it said nothing: {output}{errors}")).0.to_owned()
    }

    fn end(mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn place() -> Place {
    let number = |name: &str| std::env::var(name).unwrap().parse().unwrap();
    let (rank, ranks) = (number("RANK"), number("WORLD_SIZE"));
    let port = u16::try_from(number("MASTER_PORT")).unwrap();
    Place { rank, ranks, local_rank: rank, local_ranks: ranks, address: std::env::var("MASTER_ADDR").unwrap(), port }
}

/// What a rank does, as text for the test that started it.
fn what_it_does(does: &str) -> lora_torch::Result<String> {
    let limit = Duration::from_millis(std::env::var("LORA_TEST_LIMIT").unwrap().parse().unwrap());
    let place = place();
    let group = Group::join(&place, Device::Cpu, limit)?;
    assert_eq!(group.place(), &place);
    let ones = || Tensor::ones([1000], (Kind::Float, Device::Cpu));
    match does {
        "sums" => {
            let mut sums = Vec::new();
            for kind in [Kind::Float, Kind::Double, Kind::Int64] {
                // A size that does not divide into the pieces of any number of ranks here.
                let tensor = Tensor::arange(100_003, (kind, Device::Cpu)) * (place.rank as i64 + 1);
                group.sum(&tensor)?;
                sums.push(format!("{} {}", tensor.double_value(&[1]), tensor.double_value(&[100_002])));
            }
            group.sum(&Tensor::zeros([0], (Kind::Float, Device::Cpu)))?;
            let refused = group.sum(&Tensor::zeros([4, 4], (Kind::Float, Device::Cpu)).tr()).unwrap_err();
            assert!(refused.to_string().contains("contiguous"), "{refused}");
            Ok(sums.join(", "))
        }
        "speaks" => {
            let mut heard = Vec::new();
            // One name three times, as its keys are freed meanwhile.
            for round in 0..4 {
                let all = group.exchange("round", format!("{round}:{}", place.rank).as_bytes())?;
                heard.extend(all.into_iter().map(|bytes| String::from_utf8(bytes).unwrap()));
            }
            assert_eq!(group.exchange("nothing", &[])?, vec![Vec::<u8>::new(); place.ranks]);
            group.wait_for_all("end", LONG)?;
            assert_eq!(group.failure(), None);
            Ok(heard.join(" "))
        }
        "dies" => {
            group.sum(&ones())?;
            if place.rank == 1 {
                std::process::abort();
            }
            let error = group.sum(&ones()).unwrap_err();
            let again = group.sum(&ones()).unwrap_err();
            assert!(again.to_string().contains("lost each other"), "{again}");
            Ok(format!("left are {:?}: {error}", group.roll_call(LONG)))
        }
        "serves_and_dies" => {
            group.wait_for_all("start", LONG)?;
            if place.rank == 0 {
                std::process::abort();
            }
            group.exchange("more", b"x")?;
            Ok("it went on".into())
        }
        "fails" => {
            if place.rank == 2 {
                group.fail("its disk is full,\nit says");
                // Its connections stay open.
                std::thread::sleep(Duration::from_secs(600));
            }
            group.sum(&ones())?;
            Ok("it went on".into())
        }
        "waits" => {
            if place.rank == 1 {
                while group.failure().is_none() {
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
            let waited = group.wait_for_all("dawn", Duration::from_millis(100));
            if let Err(error) = &waited {
                group.fail(&error.to_string());
            }
            waited.map(|()| "it went on".into())
        }
        "serves" => {
            std::thread::sleep(Duration::from_secs(600));
            Ok("nobody ended it".into())
        }
        other => panic!("{other}"),
    }
}

#[test]
#[ignore = "a rank of the other tests"]
fn a_rank() {
    let Ok(does) = std::env::var("LORA_TEST_DOES") else { return };
    let said = what_it_does(&does).unwrap_or_else(|error| format!("error: {error}"));
    println!("\nsaid: {said}");
}

#[test]
fn two_and_four_ranks_sum_tensors_of_each_type() {
    for (ranks, sum) in [(2, 3.0), (4, 10.0)] {
        for rank in Rank::start_all("sums", ranks) {
            let expected = format!("{sum} {}", sum * 100_002.0);
            assert_eq!(rank.said(), [expected.as_str(); 3].join(", "));
        }
    }
}

#[test]
fn ranks_hear_what_each_says_in_the_order_of_ranks() {
    for rank in Rank::start_all("speaks", 3) {
        assert_eq!(rank.said(), "0:0 0:1 0:2 1:0 1:1 1:2 2:0 2:1 2:2 3:0 3:1 3:2");
    }
}

#[test]
fn a_rank_that_dies_ends_the_others_and_is_named() {
    let mut ranks = Rank::start_all("dies", 3);
    let died = ranks.remove(1);
    for rank in ranks {
        let said = rank.said();
        assert!(said.starts_with("left are [0, 2]: ") && said.contains("rank 1 ended"), "{said}");
    }
    died.end();
}

#[test]
fn the_end_of_the_rank_that_serves_is_an_error_of_the_others() {
    let mut ranks = Rank::start_all("serves_and_dies", 2);
    let said = ranks.remove(1).said();
    assert!(said.starts_with("error: ") && said.contains("rank 0 ended"), "{said}");
}

#[test]
fn a_rank_that_says_why_it_ends_is_heard_though_its_connections_are_open() {
    let mut ranks = Rank::start_all("fails", 3);
    let sleeps = ranks.remove(2);
    for rank in ranks {
        assert_eq!(rank.said(), "error: rank 2 ended: its disk is full, it says");
    }
    sleeps.end();
}

#[test]
fn a_meeting_names_those_who_are_late() {
    let mut ranks = Rank::start_all("waits", 2);
    let (late, waited) = (ranks.remove(1), ranks.remove(0).said());
    assert_eq!(waited, "error: rank 1 of 2 did not come to `dawn` within 100ms");
    assert_eq!(late.said(), "error: rank 0 ended: rank 1 of 2 did not come to `dawn` within 100ms");
}

#[test]
fn ranks_join_at_a_store_that_their_launcher_serves() {
    let port = free_port();
    // A process that serves a store and sees to it that the ranks live on: what torchrun is.
    let launcher = Rank::start("serves", 0, 1, port, LONG);
    for attempt in ["0", "1"] {
        let agent = [
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_RUN_ID", "a run"),
            ("TORCHELASTIC_RESTART_COUNT", attempt),
        ];
        // The second time there is everything in the store that the ranks of the first have left.
        let ranks = [1, 0].map(|rank| Rank::start_with("speaks", rank, 2, port, LONG, &agent));
        for rank in ranks {
            assert_eq!(rank.said(), "0:0 0:1 1:0 1:1 2:0 2:1 3:0 3:1");
        }
    }
    launcher.end();
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let port = free_port();
    let limit = Duration::from_secs(5);
    let said = Rank::start("sums", 0, 3, port, limit).said();
    assert!(said.contains("ranks 1, 2 of 3 did not come within 5s"), "{said}");
    // Nobody serves.
    let said = Rank::start("sums", 1, 2, port, Duration::from_secs(2)).said();
    assert!(said.contains("rank 0 could not be reached at 127.0.0.1:") && said.contains("MASTER_PORT"), "{said}");
}

#[test]
fn a_port_in_use_is_named_and_how_to_choose_another() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let said = Rank::start("sums", 0, 2, port, LONG).said();
    assert!(said.contains(&format!("port {port} ")) && said.contains("MASTER_PORT"), "{said}");
}

#[test]
fn ranks_that_do_not_fit_together_are_told_so() {
    let port = free_port();
    let (first, second) = (Rank::start("sums", 0, 2, port, LONG), Rank::start("sums", 1, 3, port, LONG));
    assert!(first.said().contains("WORLD_SIZE"));
    assert!(second.said().contains("WORLD_SIZE"));
    let port = free_port();
    let all = [0, 1, 1].map(|rank| Rank::start("sums", rank, 3, port, LONG));
    let said: Vec<String> = all.into_iter().map(Rank::said).collect();
    assert!(said.iter().any(|said| said.contains("two processes were started as rank 1")), "{said:?}");
}

#[test]
fn an_address_that_leads_nowhere_is_named() {
    let place = Place {
        rank: 1,
        ranks: 2,
        local_rank: 0,
        local_ranks: 1,
        address: "no-such-machine.invalid".into(),
        port: free_port(),
    };
    let error = Group::join(&place, Device::Cpu, Duration::from_secs(1)).unwrap_err();
    assert!(error.to_string().contains("no-such-machine.invalid") && error.to_string().contains("MASTER_ADDR"));
    let place = Place { rank: 2, address: "localhost".into(), ..place };
    assert!(Group::join(&place, Device::Cpu, LONG).unwrap_err().to_string().contains("no rank 2 of 2"));
}
