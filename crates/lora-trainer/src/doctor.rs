//! `lora doctor`: what this machine offers to training, and what is missing.

use std::path::Path;

use lora_cli::{Failure, nvidia};
use lora_core::openmp;
use lora_torch::device::{self, CudaStatus};
use lora_torch::tch::{Cuda, Device, Kind, Tensor};
use lora_torch::{graph, memory};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let cuda = device::cuda();
    let folder = device::library_folder();
    let devices: Vec<(String, Device)> = std::iter::once(("cpu".to_owned(), Device::Cpu))
        .chain((0..available(cuda)).map(|index| (format!("cuda:{index}"), Device::Cuda(index))))
        .collect();
    let precisions: Vec<(&str, Vec<&str>)> =
        devices.iter().map(|(name, device)| (name.as_str(), supported(*device))).collect();
    let host = memory::host_memory();
    let cards = nvidia::cards();
    let problems = problems(&cards, folder.as_path());
    if arguments.json {
        let json = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "libtorch": { "version": lora_torch::LIBTORCH, "folder": folder },
            "cuda": cuda.to_string(),
            "cards": cards.iter().map(|card| format!("{}, {}", card.name, card.generation())).collect::<Vec<_>>(),
            "driver": cards.first().map(|card| card.driver.as_str()),
            "problems": problems,
            "cuda_graphs": graph::available().map_or_else(|error| error.to_string(), |()| "available".into()),
            "precisions": precisions.iter().map(|(name, list)| ((*name).to_owned(), serde_json::json!(list))).collect::<serde_json::Map<_, _>>(),
            "onnxruntime": lora_caption::onnx_runtime().ok(),
            "threads": lora_torch::tch::get_num_threads(),
            "threads_wait": openmp::setting(),
        });
        println!("{json:#}");
        return Ok(());
    }
    println!("lora {} on libtorch {}", env!("CARGO_PKG_VERSION"), lora_torch::LIBTORCH);
    println!("libtorch:  {}", folder.display());
    println!("cuda:      {cuda}");
    for card in &cards {
        println!("card:      {} ({}), driver {}", card.name, card.generation(), card.driver);
    }
    problems.iter().for_each(|problem| println!("problem:   {problem}"));
    match lora_caption::onnx_runtime() {
        Ok(path) => println!("onnx:      {}", path.display()),
        Err(_) => println!("onnx:      none, which taggers need (make setup-onnx, or ORT_DYLIB_PATH)"),
    }
    if let (CudaStatus::Available(_), Err(error)) = (cuda, graph::available()) {
        println!("graphs:    none, so that steps wait for the host: {error}");
    }
    for (name, list) in &precisions {
        println!("{name:<10} trains in {}", list.join(", "));
    }
    for (name, device) in &devices {
        if let Ok(Some(memory)) = memory::device_memory(*device) {
            println!("{name:<10} {:.1} GiB free of {:.1}", gib(memory.free), gib(memory.total));
        }
    }
    println!("threads:   {}", lora_torch::tch::get_num_threads());
    match openmp::setting() {
        Some(setting) if !openmp::yields() => println!(
            "warning:   {setting} lets threads that wait keep their cores busy; beside any other busy program steps then take many times as long. Unset it, and `lora train` sees to it"
        ),
        Some(setting) => println!("           {setting}"),
        None => {}
    }
    if let Some(host) = host {
        println!("memory:    this process holds {:.2} GiB", gib(host.resident));
    }
    if !matches!(cuda, CudaStatus::Available(_)) {
        println!("training runs on the CPU here: right for small models and trials, slow for full-size ones");
    }
    Ok(())
}

/// What does not go together of the libtorch that is loaded, the driver and the cards.
fn problems(cards: &[nvidia::Card], libtorch: &Path) -> Vec<String> {
    let of_another_version = version(libtorch).filter(|version| version != lora_torch::LIBTORCH).map(|version| {
        format!(
            "libtorch is {version}, and this program was built for {}: put that one in its place",
            lora_torch::LIBTORCH
        )
    });
    let of_cuda = cuda_runtime().map_or_else(Vec::new, |cuda| nvidia::problems(cards, cuda));
    of_another_version.into_iter().chain(of_cuda).collect()
}

/// The version that files beside a libtorch say, without what was built in; an archive of ours has none.
fn version(libtorch: &Path) -> Option<String> {
    let read = |name: &str| std::fs::read_to_string(libtorch.parent()?.join(name)).ok();
    let of_build = read("build-version").and_then(|text| text.lines().next().map(str::to_owned));
    let of_wheel = || {
        let text = read("version.py")?;
        let line = text.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
        Some(line.trim_matches(['\'', '"']).to_owned())
    };
    let version = of_build.or_else(of_wheel)?;
    Some(version.split('+').next().unwrap_or_default().trim().to_owned())
}

/// The major version of CUDA that libtorch is built with: that of the run-time library which is loaded with it.
fn cuda_runtime() -> Option<u32> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| line.rsplit_once("libcudart.so.")?.1.split('.').next()?.parse().ok())
}

fn available(cuda: &CudaStatus) -> usize {
    if matches!(cuda, CudaStatus::Available(_)) { Cuda::device_count().max(0) as usize } else { 0 }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Number types in which the device multiplies matrices; fp16 is left out on the CPU, where training in it falls back.
fn supported(device: Device) -> Vec<&'static str> {
    let kinds = [("fp32", Kind::Float), ("bf16", Kind::BFloat16), ("fp16", Kind::Half)];
    let works = |kind: Kind| {
        let square = Tensor::f_ones([16, 16], (kind, device));
        square.and_then(|square| square.f_matmul(&square)).is_ok_and(|product| product.size() == [16, 16])
    };
    kinds
        .into_iter()
        .filter(|&(_, kind)| (kind != Kind::Half || device != Device::Cpu) && works(kind))
        .map(|(name, _)| name)
        .collect()
}
