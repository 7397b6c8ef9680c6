//! The command as a user meets it, with both programs: exit status, messages, files, interrupts.

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::prelude::*;
use common::{lora, workspace};
use lora_core::random::Stream;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath};
use lora_io::adapter::{self, Format};
use lora_models::synthetic::SyntheticModel;
use predicates::prelude::*;
use predicates::str::contains;

fn train(folder: &Path, arguments: &[&str]) -> assert_cmd::assert::Assert {
    lora().current_dir(folder).args(["train", "config.toml"]).args(arguments).assert()
}

#[test]
fn a_run_says_what_it_does_and_what_it_left() {
    let folder = workspace();
    train(folder.path(), &[]).success().stdout(contains("out/lora.safetensors").and(contains("out/loss.png"))).stderr(
        contains("pictures:  4")
            .and(contains("4 from .txt"))
            .and(contains("0.png: colour 0"))
            .and(contains("70 of 299 layers"))
            .and(contains("on the CPU this run trains in fp32"))
            .and(contains("2 steps"))
            .and(contains("step 2/2 loss")),
    );
    let file = folder.path().join("out/lora.safetensors");
    lora()
        .arg("info")
        .arg(&file)
        .assert()
        .success()
        .stdout(contains("6 text_encoder, 64 unet").and(contains("{2}")).and(contains("variant: 70 lora")));
    let json = lora().arg("info").arg("--json").arg(&file).assert().success().get_output().stdout.clone();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["metadata"]["ss_steps"], "2");
    assert_eq!(json["sshs_model_hash"], json["metadata"]["sshs_model_hash"]);

    let json = train(folder.path(), &["--json", "--set", "output_name=other"]).success().get_output().stdout.clone();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!((json["steps"].as_u64(), json["stopped"].is_null()), (Some(2), true));
}

#[test]
fn usage_mistakes_end_with_2_and_failed_work_with_1() {
    let folder = workspace();
    lora().assert().code(2);
    lora().args(["train", "nothing.toml"]).assert().code(2).stderr(contains("nothing.toml"));
    train(folder.path(), &["--set", "lora_rnk=2"]).code(2).stderr(contains("did you mean `lora_rank`"));
    train(folder.path(), &["--set", "target_modules=nothing_like_it"]).code(2).stderr(contains("nothing_like_it"));
    train(folder.path(), &["--set", "base_model=none.safetensors"]).code(1).stderr(contains("none.safetensors"));
    train(folder.path(), &["--set", "device=cuda:7"]).code(1).stderr(contains("cuda:7"));
    std::fs::write(folder.path().join("x.ckpt"), b"PK\x03\x04\x14\0archive/data.pkl").unwrap();
    train(folder.path(), &["--set", "base_model=x.ckpt"]).code(1).stderr(contains("pickle").and(contains("convert")));
    std::fs::write(folder.path().join("data/0.txt"), b"caf\xe9").unwrap();
    std::fs::write(folder.path().join("data/1.txt"), b"na\xefve").unwrap();
    let both = contains("0.txt").and(contains("1.txt")).and(contains("UTF-8"));
    train(folder.path(), &[]).code(1).stderr(both);
    let arguments = ["dataset", "--config", "config.toml", "--set", "caption_encoding=latin1"];
    lora().current_dir(folder.path()).args(arguments).assert().success();
    lora().args(["info", "config.toml"]).current_dir(folder.path()).assert().code(1).stderr(contains("config.toml"));
    assert!(!folder.path().join("out/lora.safetensors").exists(), "nothing half-written");
}

#[test]
fn an_interrupt_saves_the_lora() {
    let folder = workspace();
    let mut child = lora()
        .current_dir(folder.path())
        .args(["train", "config.toml", "--set", "max_train_steps=100000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The first line of metrics says that the loop runs.
    let metrics = folder.path().join("out/metrics.jsonl");
    let start = Instant::now();
    while std::fs::metadata(&metrics).map_or(0, |file| file.len()) == 0 {
        assert!(start.elapsed() < Duration::from_secs(120), "training did not begin");
        std::thread::sleep(Duration::from_millis(50));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(child.wait().unwrap().success());
    let output = std::io::read_to_string(child.stdout.take().unwrap()).unwrap();
    assert!(output.contains("stopped early (interrupted)"), "{output}");
    lora().arg("info").arg(folder.path().join("out/lora.safetensors")).assert().success();
}

#[test]
fn the_doctor_and_the_reference_answer() {
    lora().arg("doctor").assert().success().stdout(contains("libtorch 2.11.0").and(contains("fp32")));
    let json = lora().args(["doctor", "--json"]).assert().success().get_output().stdout.clone();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert!(json["precisions"]["cpu"].as_array().unwrap().iter().any(|precision| precision == "fp32"));
    lora().arg("keys").assert().success().stdout(contains("`gradient_accumulation_steps`"));
}

/// A trained LoRA goes into its base and comes out again; files pass from one format to the next.
#[test]
fn finished_adapters_are_merged_extracted_resized_and_converted() {
    let folder = workspace();
    train(folder.path(), &["--set", "target_modules=[\"attention-mlp\"]", "--set", "learning_rate=0.05"]).success();
    let run = |arguments: &[&str]| lora().current_dir(folder.path()).args(arguments).assert();
    let file = "out/lora.safetensors";
    run(&[
        "merge",
        "--base",
        "base.safetensors",
        "--lora",
        "out/lora.safetensors:0.8",
        "--out",
        "merged.safetensors",
        "--dtype",
        "fp32",
    ])
    .success()
    .stdout(contains("tensors changed"));
    run(&[
        "extract",
        "--base",
        "base.safetensors",
        "--tuned",
        "merged.safetensors",
        "--out",
        "back.safetensors",
        "--rank",
        "2",
    ])
    .success()
    .stderr(contains("ranks 2 to 2").or(contains("ranks 1 to 2")));
    // The same adapter at strength 0.8: taking it away leaves next to nothing.
    let difference = [
        "combine",
        "--lora",
        "back.safetensors",
        "--lora",
        "out/lora.safetensors:-0.8",
        "--out",
        "rest.safetensors",
        "--dtype",
        "fp32",
    ];
    run(&difference).success();
    run(&[
        "merge",
        "--base",
        "base.safetensors",
        "--lora",
        "rest.safetensors",
        "--out",
        "same.safetensors",
        "--dtype",
        "fp32",
    ])
    .success();
    run(&["resize", file, "--rank", "1", "--out", "small.safetensors"]).success().stderr(contains("ranks 1 to 1"));
    run(&["info", "small.safetensors"]).success().stdout(contains("{1}"));
    run(&["resize", file, "--out", "small.safetensors"]).code(2).stderr(contains("--sv-ratio"));
    run(&["resize", file, "--rank", "1", "--out", file]).code(2).stderr(contains("which is read"));
    run(&["convert", file, "--to", "peft", "--out", "folder"]).success().stderr(contains("text_encoder, unet"));
    run(&["info", "folder/unet"]).success().stdout(contains("format:     peft"));
    run(&["convert", "folder/unet", "--to", "diffusers", "--out", "d.safetensors"]).success();
    run(&["convert", "d.safetensors", "--to", "kohya", "--out", "k.safetensors", "--alpha", "1"]).success();
    run(&["info", "k.safetensors"]).success().stdout(contains("alpha: [1.0]"));
    run(&["merge", "--base", "base.safetensors", "--lora", "out/lora.safetensors:x", "--out", "y"]).code(1);
    run(&["merge", "--base", "base.safetensors", "--lora", "k.safetensors", "--out", "base.safetensors"])
        .code(1)
        .stderr(contains("which is read"));
}

/// Every variant trains, saves in a layout that has it, and merges.
#[test]
fn other_variants_train_and_merge() {
    let folder = workspace();
    for (variant, options) in
        [("dora", "{}"), ("loha", "{}"), ("lokr", "{factor = 4}"), ("pissa", "{}"), ("oft", "{rescale = true}")]
    {
        let settings =
            [format!("variant={variant}"), format!("variant_options={options}"), format!("output_name={variant}")];
        let arguments: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        train(folder.path(), &arguments).success();
        let run = |arguments: &[&str]| lora().current_dir(folder.path()).args(arguments).assert();
        let file = format!("out/{variant}.safetensors");
        run(&["merge", "--base", "base.safetensors", "--lora", &file, "--out", "merged.safetensors"]).success();
        run(&[
            "convert",
            &file,
            "--to",
            "portable",
            "--out",
            &format!("{variant}-flat"),
            "--flatten",
            "4",
            "--base",
            "base.safetensors",
        ])
        .success();
    }
    train(folder.path(), &["--set", "variant=vera"]).code(1).stderr(contains("no form of vera"));
}

/// The running average of one run's saves.
#[test]
fn saves_of_one_run_are_averaged_by_their_order() {
    let folder = workspace();
    let keys = ["save_every_n_steps=1", "max_train_steps=3", "learning_rate=0.05", "save_precision=fp32"];
    train(folder.path(), &keys.iter().flat_map(|key| ["--set", key]).collect::<Vec<_>>()).success();
    let saves = ["out/lora-step000001.safetensors", "out/lora-step000002.safetensors", "out/lora.safetensors"];
    let run = |arguments: &[&str]| {
        lora().current_dir(folder.path()).args(["combine", "--out", "mean.safetensors"]).args(arguments).assert()
    };
    run(&[&["--ema", "0.8"], &saves[..]].concat()).success().stderr(contains("lora-step000002 0.1600"));
    let read = |name: &str| adapter::read(folder.path().join(name)).unwrap().adapter;
    let (mean, all) = (read("mean.safetensors"), saves.map(read));
    for (path, module) in &mean.modules {
        for (name, tensor) in &module.tensors {
            let of = |adapter: &Adapter| adapter.modules[path].tensors[name].to_f32().into_owned();
            let [first, second, third] = [of(&all[0]), of(&all[1]), of(&all[2])];
            let expected = (0..first.len()).map(|at| 0.64 * first[at] + 0.16 * second[at] + 0.2 * third[at]);
            assert!(
                tensor.to_f32().iter().zip(expected).all(|(own, other)| (own - other).abs() < 1e-6),
                "{path} {name}"
            );
        }
    }
    assert!(mean.metadata["lora_ema"].contains("decay 0.8") && mean.metadata.contains_key("ss_network_dim"));
    run(&["--ema", "1", saves[0], saves[1]]).code(2).stderr(contains("below 1"));
    run(&["--ema", "0.5", "--rank", "2", saves[0], saves[1]]).code(2);
    run(&["--ema", "0.5", "out/lora.safetensors:0.5"]).code(2).stderr(contains("strength"));
    run(&[]).code(2);
}

/// Pruning methods, the picture of norms, and a language model's adapter on its way to llama.cpp.
#[test]
fn adapters_are_pruned_drawn_and_written_as_gguf() {
    let folder = workspace();
    train(folder.path(), &["--set", "learning_rate=0.05"]).success();
    let run = |arguments: &[&str]| lora().current_dir(folder.path()).args(arguments).assert();
    let (first, second) = ("out/lora.safetensors:0.8", "out/lora.safetensors:-0.3");
    let combine = |arguments: &[&str]| {
        run(&[&["combine", "--lora", first, "--lora", second, "--out", "c.safetensors"], arguments].concat())
    };
    combine(&["--method", "ties", "--density", "0.5"]).success();
    combine(&["--method", "dare-ties", "--density", "0.5", "--seed", "3", "--rank", "2"])
        .success()
        .stderr(contains("ranks 2 to 2"));
    combine(&["--method", "ties"]).code(2).stderr(contains("--density"));
    combine(&["--method", "magnitude-prune", "--density", "0"]).code(1).stderr(contains("density"));
    combine(&["--density", "0.5"]).code(2).stderr(contains("pruning"));
    run(&["check", "out/lora.safetensors", "--picture", "norms.png"]).success();
    assert!(std::fs::read(folder.path().join("norms.png")).unwrap().starts_with(b"\x89PNG"));

    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-io/tests/golden/gguf/llama.gguf");
    run(&["dequantise", model, "--out", "model.safetensors"]).success().stdout(contains("21 tensors"));
    let mut adapter = Adapter::default();
    let random = |shape: [usize; 2]| HostTensor::from_f32(shape, Stream::new(1).normals(shape[0] * shape[1])).unwrap();
    let tensors = [("down".to_owned(), random([2, 32])), ("up".to_owned(), random([32, 2]))].into();
    let module = AdapterModule { variant: "lora".into(), tensors, rank: 2, alpha: 4.0 };
    adapter.modules.insert(ModulePath::new(Component::LANGUAGE_MODEL, "model.layers.1.self_attn.q_proj"), module);
    adapter::write(folder.path().join("peft"), &adapter, Format::Peft, DType::F32).unwrap();
    run(&["convert", "peft", "--to", "gguf", "--out", "a.gguf"]).code(1).stderr(contains("--base"));
    run(&["convert", "peft", "--to", "gguf", "--out", "a.gguf", "--base", model]).success();
    run(&["info", "a.gguf"]).success().stdout(contains("format:     gguf"));
    run(&["check", "a.gguf"]).success().stdout(contains("llama.cpp   loads"));
    run(&["convert", "a.gguf", "--to", "peft", "--out", "back"]).success();
    let read = |name: &str| adapter::read(folder.path().join(name)).unwrap().adapter.modules;
    assert_eq!(read("back"), read("peft"));
    run(&["merge", "--base", "model.safetensors", "--lora", "back:0.5", "--out", "merged.safetensors"])
        .success()
        .stdout(contains("1 tensors changed"));
}

#[test]
fn a_dataset_is_looked_at_before_training() {
    let folder = workspace();
    let data = folder.path().join("data");
    let grain = |seed: u64, side: u32| {
        let mut random = Stream::new(seed);
        let spots: Vec<u32> = (0..64).map(|_| random.next_u32() % 256).collect();
        image::RgbImage::from_fn(side, side, |x, y| {
            let spot = spots[(8 * y / side * 8 + 8 * x / side) as usize];
            image::Rgb([spot as u8, (spot / 2) as u8, 255 - spot as u8])
        })
    };
    for (name, seed, side) in [("big", 1, 640), ("twin", 1, 600), ("other", 2, 640)] {
        grain(seed, side).save(data.join(format!("{name}.png"))).unwrap();
        std::fs::write(data.join(format!("{name}.txt")), format!("{name}, pattern")).unwrap();
    }
    std::fs::copy(data.join("other.png"), data.join("other2.png")).unwrap();
    image::RgbImage::from_pixel(900, 90, image::Rgb([3, 3, 3])).save(data.join("strip.png")).unwrap();
    image::imageops::blur(&grain(3, 640), 12.0).save(data.join("soft.png")).unwrap();
    std::fs::write(data.join("long.txt"), "alone").unwrap();
    std::fs::write(data.join("broken.jpg"), b"\xff\xd8\xff").unwrap();
    std::fs::write(data.join("soft.txt"), "word ".repeat(100)).unwrap();
    let page = folder.path().join("page.html");
    let output = lora().arg("dataset").arg(&data).arg("--json").arg("--html").arg(&page).assert().success();
    let json: serde_json::Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    let found = |kind: &str| -> Vec<String> {
        let findings = json["findings"].as_array().unwrap().iter().filter(|finding| finding["kind"] == kind);
        findings.map(|finding| finding["path"].as_str().unwrap().rsplit('/').next().unwrap().to_owned()).collect()
    };
    assert_eq!(found("unreadable"), ["broken.jpg"]);
    assert_eq!(found("orphan-caption"), ["long.txt"]);
    assert_eq!(found("exact-duplicate"), ["other2.png"]);
    assert_eq!(found("near-duplicate"), ["twin.png"]);
    assert_eq!(found("extreme-aspect"), ["strip.png"]);
    assert_eq!(found("dark"), ["strip.png"]);
    assert_eq!(found("blurred"), ["soft.png"]);
    assert_eq!(found("long-caption"), ["soft.png"]);
    assert_eq!(found("missing-caption"), ["other2.png", "strip.png"]);
    assert_eq!(found("low-resolution").len(), 5, "four of 64 pixels and the strip");
    assert_eq!(json["buckets"]["512×512"], 10);
    assert_eq!(json["captions"]["empty"], 2);
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("broken.jpg") && page.matches("data:image/jpeg;base64,").count() == 20);
    assert!(!page.contains("src=\"http") && page.starts_with("<!doctype html>"));

    lora().arg("dataset").arg(&data).assert().success().stdout(
        contains("near-duplicate (warning): 1").and(contains("nearly the same as big.png")).and(contains("512×512")),
    );
    lora()
        .arg("dataset")
        .arg(&data)
        .arg("--strict")
        .assert()
        .code(1)
        .stderr(contains("2 file(s)").or(contains("1 file(s)")));
    lora()
        .current_dir(folder.path())
        .args(["dataset", "--config", "config.toml", "--set", "enable_bucket=true", "min_bucket_reso=64"])
        .assert()
        .success()
        .stdout(contains("64×64"));
    lora().args(["dataset", "no/such/folder"]).assert().code(1).stderr(contains("no/such/folder"));
    lora().arg("dataset").assert().code(2);
    std::fs::create_dir(folder.path().join("empty")).unwrap();
    lora()
        .arg("dataset")
        .arg(folder.path().join("empty"))
        .assert()
        .code(1)
        .stderr(contains("nothing found to train on").or(contains("no pictures")));
}

#[test]
fn info_tells_the_family_of_a_base_model() {
    let folder = workspace();
    let base = folder.path().join("xl.safetensors");
    SyntheticModel::tiny_sdxl().write(&base, DType::F16).unwrap();
    let shown = contains("base model: Stable Diffusion XL").and(contains("text encoder 2"));
    lora().arg("info").arg(&base).assert().success().stdout(shown);
    let json = lora().arg("info").arg("--json").arg(&base).assert().success().get_output().stdout.clone();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!((json["base"].as_str(), json["marks"].as_array().map(Vec::len)), (Some("sdxl"), Some(0)));
    assert!(json["components"]["unet"]["parameters"].as_u64().unwrap() > 0);
    // A base that is refused is named for what it lacks, not for being no adapter.
    let cut = folder.path().join("cut");
    std::fs::create_dir_all(cut.join("unet")).unwrap();
    std::fs::write(cut.join("model_index.json"), "{}").unwrap();
    let reason = contains("has no diffusion_pytorch_model.safetensors");
    lora().arg("info").arg(&cut).assert().code(1).stderr(reason);
}

#[test]
fn threads_that_keep_cores_busy_are_warned_of() {
    let doctor = |value: &str| lora().arg("doctor").env("GOMP_SPINCOUNT", value).assert().success();
    doctor("300000").stdout(contains("warning:").and(contains("GOMP_SPINCOUNT=300000")));
    doctor("1000").stdout(contains("warning:").not().and(contains("GOMP_SPINCOUNT=1000")));
}

/// The environment that a run trains in, which libtorch's threads are made by.
#[cfg(target_os = "linux")]
#[test]
fn a_run_beside_a_busy_program_lets_its_threads_yield_unless_it_is_told_otherwise() {
    let folder = workspace();
    let mut busy = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
    let environment = |variable: Option<(&str, &str)>| {
        let mut command = lora();
        command.current_dir(folder.path()).args(["train", "config.toml", "--set", "max_train_steps=1000000"]);
        for name in ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"] {
            command.env_remove(name);
        }
        command.envs(variable).stdout(Stdio::null()).stderr(Stdio::null());
        let mut run = command.spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        // Once there are metrics, training has begun.
        while !folder.path().join("out/metrics.jsonl").exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let environment = std::fs::read(format!("/proc/{}/environ", run.id())).unwrap();
        run.kill().unwrap();
        run.wait().unwrap();
        std::fs::remove_file(folder.path().join("out/metrics.jsonl")).unwrap();
        String::from_utf8_lossy(&environment).into_owned()
    };
    let (untold, told) = (environment(None), environment(Some(("GOMP_SPINCOUNT", "20"))));
    busy.kill().unwrap();
    busy.wait().unwrap();
    assert!(untold.contains("OMP_WAIT_POLICY=PASSIVE"));
    assert!(told.contains("GOMP_SPINCOUNT=20") && !told.contains("OMP_WAIT_POLICY"), "{told}");
}

#[test]
fn pictures_are_drawn_with_adapters_and_beside_the_base() {
    let folder = workspace();
    train(folder.path(), &[]).success();
    let sample = |arguments: &[&str]| {
        let usual = ["sample", "--base", "base.safetensors", "--size", "64", "--steps", "2", "--set", "device=cpu"];
        lora().current_dir(folder.path()).args(usual).args(arguments).assert()
    };
    let size = |path: &str| image::image_dimensions(folder.path().join(path)).unwrap();
    sample(&["--prompt", "a <lora:lora:0.5>", "--lora-dir", "out", "--out", "new/one.png"]).success();
    assert_eq!(size("new/one.png"), (64, 64));
    sample(&["--prompt", "a --w 128", "--lora", "out/lora.safetensors:0.5", "--count", "2", "--out", "many"]).success();
    assert_eq!((size("many/0001.png"), size("many/0002.png")), ((128, 64), (128, 64)));
    let compare = ["--lora", "out/lora.safetensors", "--compare", "--strengths", "0,1", "--count", "2"];
    sample(&[&["--prompt", "a", "--out", "compared.png"], &compare[..]].concat()).success();
    // Two rows and two columns of cells that are 128 pixels a side.
    assert!(size("compared.png").0 > 256 && size("compared.png").1 > 256);

    let nearest = contains("<lora:lors>").and(contains("the nearest are `lora`"));
    sample(&["--prompt", "a <lora:lors>", "--lora-dir", "out"]).code(2).stderr(nearest);
    sample(&["--prompt", "a", "--compare"]).code(2).stderr(contains("--compare needs an adapter"));
    sample(&["--prompt", "a", "--out", "picture.jpg"]).code(2).stderr(contains("picture.jpg"));
    sample(&["--prompt", "a", "--sampler", "heun"]).code(2).stderr(contains("heun").and(contains("dpmpp_2m")));
    let other = folder.path().join("xl.safetensors");
    SyntheticModel::tiny_sdxl().write(&other, DType::F16).unwrap();
    let refused = contains("Stable Diffusion XL").and(contains("out/lora.safetensors"));
    let arguments = ["sample", "--base", "xl.safetensors", "--prompt", "a", "--lora", "out/lora.safetensors"];
    lora().current_dir(folder.path()).args(arguments).assert().code(1).stderr(refused);
}
