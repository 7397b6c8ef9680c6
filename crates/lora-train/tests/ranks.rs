//! Runs of several ranks, as real processes: this program starts itself again, once for each rank, as the test `a_rank`. What they
//! leave is held against one process that accumulates as many micro-batches.

mod common;

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use common::{config, distance, exact, workspace};
use lora_core::{Adapter, DType};
use lora_models::synthetic::SyntheticModel;
use lora_train::callback::{Callback, Control};
use lora_train::{Plugins, Session, StepReport, ranks, train};

/// How far two runs may be apart: losses, relative, and what is learnt, against its largest number.
type Bounds = (f64, f32);

/// Two ranks without accumulation add up as one process with two micro-batches does, to the bit; only the loss that is told is
/// rounded to f32 in each rank.
const SAME_ORDER: Bounds = (1e-6, 0.0);

/// Sums in another order differ in their last bit, and a few steps make more of it: on some processors 4e-5 of a loss,
/// 5e-3 of what was learnt. A wrong weight of a rank's share would be a part of the whole.
const OTHER_ORDER: Bounds = (2e-4, 2e-2);

/// Writes losses down as they come, and ends the run, of its own will or as if it were shot, after a step.
struct Watch {
    losses: Option<std::path::PathBuf>,
    stop_after: Option<usize>,
    die_after: Option<usize>,
}

impl Callback for Watch {
    fn on_step(&mut self, session: &mut Session, report: &StepReport) -> lora_train::Result<Control> {
        if let Some(path) = self.losses.as_ref().filter(|_| session.rank().0 == 0) {
            let before = std::fs::read_to_string(path).unwrap_or_default();
            std::fs::write(path, format!("{before}{:e}\n", report.loss)).unwrap();
        }
        if self.die_after == Some(report.step) {
            std::process::abort();
        }
        Ok(match self.stop_after == Some(report.step) {
            true => Control::Stop("enough".into()),
            false => Control::Continue,
        })
    }
}

/// A port that nothing listens on now, of those that the system gives no connection by itself, as it might do until a rank
/// listens there.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(131);
    let ports = std::iter::repeat_with(|| 10_000 + first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000);
    let mut ports = ports.map(|port| u16::try_from(port).unwrap());
    ports.find(|&port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()).unwrap()
}

/// How many ranks there is a device for.
fn devices() -> usize {
    match (exact(), lora_torch::device::cuda()) {
        (false, lora_torch::device::CudaStatus::Available(cards)) => *cards,
        _ => usize::MAX,
    }
}

fn number(name: &str) -> Option<usize> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

#[test]
#[ignore = "a rank of the other tests, which start it"]
fn a_rank() {
    let Ok(folder) = std::env::var("LORA_TEST_FOLDER") else { return };
    let keys = std::env::var("LORA_TEST_KEYS").unwrap();
    let keys: Vec<&str> = keys.lines().collect();
    let mut config = config(folder.as_ref(), &keys);
    config.place = ranks::place().unwrap();
    // One of one is a process that trains alone.
    let rank = config.place.as_ref().map_or(0, |place| place.rank);
    let of_rank = |name: &str| number(&format!("{name}_{rank}"));
    let watch = Watch {
        losses: Some(Path::new(&folder).join("losses")),
        stop_after: of_rank("LORA_TEST_STOP"),
        die_after: of_rank("LORA_TEST_DIE"),
    };
    let stop = Arc::new(AtomicBool::new(false));
    match train(config, &Plugins::default(), vec![Box::new(watch)], &stop, &mut |_| {}) {
        Ok(result) => println!("ended: {:?} after {}", result.stopped, result.steps),
        Err(error) => println!("failed: {error}"),
    }
    assert!(!stop.load(Ordering::Relaxed));
}

/// Ranks in one folder.
struct Ranks<'f> {
    folder: &'f Path,
    keys: Vec<String>,
    /// Further variables, and keys of one rank.
    variables: Vec<(&'static str, &'static str)>,
    own: Option<(usize, String)>,
    /// Of those that are to come.
    absent: Option<usize>,
}

impl<'f> Ranks<'f> {
    fn new(folder: &'f Path, keys: &[&str]) -> Self {
        let keys = keys.iter().map(|&key| key.to_owned()).collect();
        Self { folder, keys, variables: Vec::new(), own: None, absent: None }
    }

    fn start(&self, rank: usize, ranks: usize, port: u16) -> Child {
        let own = self.own.as_ref().filter(|(of, _)| *of == rank).map(|(_, key)| key.as_str());
        let keys: Vec<&str> = self.keys.iter().map(String::as_str).chain(own).collect();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["a_rank", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        command.env("LORA_TEST_FOLDER", self.folder).env("LORA_TEST_KEYS", keys.join("\n"));
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", ranks.to_string());
        command.env("MASTER_PORT", port.to_string()).env("MASTER_ADDR", "localhost");
        // The same sums within an operation as the process that they are held against.
        command.envs(self.variables.iter().copied()).env("OMP_NUM_THREADS", "1");
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// What each of them said in the end.
    fn run(&self, ranks: usize) -> Vec<String> {
        let port = free_port();
        let started = (0..ranks).filter(|rank| self.absent != Some(*rank));
        let started: Vec<Child> = started.map(|rank| self.start(rank, ranks, port)).collect();
        started.into_iter().map(|rank| said(rank.wait_with_output().unwrap())).collect()
    }

    fn losses(&self) -> Vec<f64> {
        let text = std::fs::read_to_string(self.folder.join("losses")).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }

    fn learnt(&self) -> Adapter {
        lora_io::adapter::read(self.folder.join("out/lora.safetensors")).unwrap().adapter
    }
}

fn said(output: Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line =
        text.lines().find_map(|line| ["failed: ", "ended: "].iter().find_map(|word| Some(&line[line.find(word)?..])));
    line.map_or_else(|| format!("died: {:?} {}", output.status, String::from_utf8_lossy(&output.stderr)), str::to_owned)
}

/// A run of one process that accumulates so many micro-batches.
fn alone(folder: &Path, keys: &[&str], accumulation: usize) -> (Vec<f64>, Adapter) {
    lora_torch::tch::set_num_threads(1);
    let accumulation = format!("gradient_accumulation_steps={accumulation}");
    let (adapter, reports) = common::trained(folder, &[keys, &[&accumulation]].concat());
    (reports.iter().map(|report| report.loss).collect(), adapter)
}

fn assert_equal(run: &Ranks<'_>, (losses, adapter): &(Vec<f64>, Adapter), (of_losses, of_learnt): Bounds) {
    let own = run.losses();
    assert_eq!(own.len(), losses.len());
    let (of_losses, of_learnt) = if exact() { (of_losses, of_learnt) } else { (2e-3, 0.05) };
    for (a, b) in own.iter().zip(losses) {
        assert!((a - b).abs() <= of_losses * b.abs(), "{own:?} {losses:?}");
    }
    let distance = distance(&run.learnt(), adapter);
    assert!(distance <= of_learnt, "{distance}");
}

/// Eight pictures, whose epoch ends within a step of three micro-batches of two. Half precision in files would hide what differs, and
/// AdamW's own epsilon make as much of the last bit of a small gradient as of a large one.
const KEYS: [&str; 7] = [
    "optimizer_args=[\"eps=1e-2\"]",
    "batch_size=2",
    "max_train_steps=6",
    "save_precision=fp32",
    "lora_dropout=0.1",
    "caption_dropout_rate=0.3",
    "output_name=lora",
];

#[test]
fn ranks_make_the_run_of_one_that_accumulates_as_much() {
    let folder = workspace();
    let cache = format!("cache_dir={}", folder.path().join("cache").display());
    for (ranks, accumulation, encoded, bounds) in [
        (2, 1, "cache_latents=true", SAME_ORDER),
        // Examples that are read at each visit, and those that ranks encode in shares.
        (3, 1, "cache_latents=false", OTHER_ORDER),
        (2, 2, cache.as_str(), OTHER_ORDER),
    ]
    .into_iter()
    .filter(|(ranks, ..)| *ranks <= devices())
    {
        let _ = std::fs::remove_file(folder.path().join("losses"));
        let accumulated = format!("gradient_accumulation_steps={accumulation}");
        let run = Ranks::new(folder.path(), &[&KEYS[..], &[&accumulated, encoded]].concat());
        let said = run.run(ranks);
        assert!(said.iter().all(|said| said == "ended: None after 6"), "{said:?}");
        let alone = alone(folder.path(), &[&KEYS[..], &[encoded]].concat(), ranks * accumulation);
        assert_equal(&run, &alone, bounds);
    }
}

#[test]
fn a_run_of_two_goes_on_with_one_two_and_four() {
    let folder = workspace();
    let keys = [&KEYS[..], &["gradient_accumulation_steps=2", "save_state=true"]].concat();
    let whole = alone(folder.path(), &KEYS, 4);
    let mut first = Ranks::new(folder.path(), &keys);
    // What one rank wants all do, whichever it is.
    first.variables = vec![("LORA_TEST_STOP_1", "3")];
    let said = first.run(2);
    assert_eq!(said, ["ended: Some(\"another rank was stopped\") after 3", "ended: Some(\"enough\") after 3"]);
    let begun = folder.path().join("out/lora-state.safetensors");
    let (state, losses) = (std::fs::read(&begun).unwrap(), std::fs::read(folder.path().join("losses")).unwrap());
    for ranks in [1, 2, 4].into_iter().filter(|&ranks| ranks <= devices()) {
        std::fs::write(&begun, &state).unwrap();
        std::fs::write(folder.path().join("losses"), &losses).unwrap();
        let run = Ranks::new(folder.path(), &[&keys[..], &["resume=true"]].concat());
        let said = run.run(ranks);
        assert!(said.iter().all(|said| said == "ended: None after 6"), "{said:?}");
        assert_equal(&run, &whole, OTHER_ORDER);
    }
}

#[test]
fn a_rank_that_dies_ends_all_and_leaves_a_state_to_go_on_from() {
    // No state was asked for; which rank dies decides which of the others saves one.
    for dies in ["LORA_TEST_DIE_1", "LORA_TEST_DIE_0"] {
        let folder = workspace();
        let mut run = Ranks::new(folder.path(), &[&KEYS[..], &["gradient_accumulation_steps=2"]].concat());
        run.variables = vec![(dies, "3")];
        let said = run.run(2);
        let (left, dead) = if dies.ends_with('1') { (0, 1) } else { (1, 0) };
        assert!(said[dead].starts_with("died"), "{said:?}");
        assert!(said[left].starts_with("failed") && said[left].contains(&format!("rank {dead}")), "{said:?}");
        let state = folder.path().join("out/lora-state.safetensors");
        assert!(state.exists(), "{said:?}");
        let again = Ranks::new(folder.path(), &[&KEYS[..], &["gradient_accumulation_steps=2", "resume=true"]].concat());
        let said = again.run(2);
        assert!(said.iter().all(|said| said == "ended: None after 6"), "{said:?}");
        let (_, adapter) = alone(folder.path(), &KEYS, 4);
        let distance = distance(&again.learnt(), &adapter);
        assert!(distance <= OTHER_ORDER.1, "{distance}");
    }
}

#[test]
fn ranks_that_were_to_make_different_runs_say_how_they_differ() {
    let other = workspace();
    std::fs::write(other.path().join("data/0.txt"), "a caption that rank 0 does not have").unwrap();
    // The same numbers in another file: a hash tells the two apart.
    SyntheticModel::tiny().write(other.path().join("base.safetensors"), DType::F32).unwrap();
    let of_other = |key: &str, name: &str| format!("{key}={}", other.path().join(name).display());
    for (key, named) in [
        ("lora_rank=8".to_owned(), "lora_rank is 8 there and 4 on rank 0"),
        ("learning_rate=0.5".to_owned(), "learning_rate is 0.5 there and 0.001 on rank 0"),
        (of_other("train_data_dir", "data"), "there and"),
        (of_other("base_model", "base.safetensors"), "base_model is "),
    ] {
        let folder = workspace();
        let mut run = Ranks::new(folder.path(), &KEYS);
        run.own = Some((1, key));
        for said in run.run(2) {
            assert!(said.starts_with("failed") && said.contains("rank 1 differs") && said.contains(named), "{said}");
        }
        assert!(!folder.path().join("out/lora.safetensors").exists());
    }
}

#[test]
fn a_rank_that_cannot_begin_ends_all_with_its_reason() {
    let folder = workspace();
    let mut run = Ranks::new(folder.path(), &KEYS);
    run.own = Some((1, "base_model=nowhere.safetensors".to_owned()));
    let said = run.run(2);
    assert!(said[1].starts_with("failed") && said[1].contains("nowhere.safetensors"), "{said:?}");
    assert!(said[0].contains("rank 1 ended") && said[0].contains("nowhere.safetensors"), "{said:?}");
}

#[test]
fn a_rank_that_never_comes_is_named_with_the_time_limit() {
    let folder = workspace();
    let mut run = Ranks::new(folder.path(), &[&KEYS[..], &["ddp_timeout=2"]].concat());
    run.absent = Some(1);
    let said = run.run(2);
    assert!(said[0].contains("rank 1") && said[0].contains("2s"), "{said:?}");
}
