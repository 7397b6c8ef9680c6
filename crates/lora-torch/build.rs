//! Compiles the C++ shim against the libtorch that torch-sys found, and tells dependents where that libtorch is. What needs
//! CUDA's headers becomes an object of its own, which the library embeds: an empty file where they are not.

use std::path::{Path, PathBuf};

/// Headers of CUDA that libtorch's own ask for, in the folder that PyPI's wheels put beside torch.
const CUDA_HEADERS: [&str; 3] = ["cuda.h", "cuda_runtime_api.h", "crt/host_defines.h"];
/// Those that c10d's header for NCCL asks for beyond.
const NCCL_HEADERS: [&str; 3] = ["nccl.h", "nv/target", "cublas_v2.h"];

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    let object = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join("lora_cuda.so");
    std::fs::write(&object, []).expect("cargo's folder can be written to");
    if std::env::var_os("CARGO_FEATURE_DOC_ONLY").is_some() || std::env::var_os("DOCS_RS").is_some() {
        return;
    }
    // torch-sys (a direct dependency for this reason) exports the library folder that it settled on.
    let lib = PathBuf::from(std::env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys exports its libtorch folder"));
    let lib = lib.canonicalize().unwrap_or(lib);
    let include = std::env::var_os("LIBTORCH_INCLUDE")
        .map(PathBuf::from)
        .or_else(|| lib.parent().map(Path::to_path_buf))
        .expect("libtorch's lib folder has a parent")
        .join("include");
    let abi = std::env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into());
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        // As libtorch itself was built: some of its objects have other members without.
        .define("NDEBUG", None)
        // Numbers are to be the same on every machine.
        .flag_if_supported("-ffp-contract=off")
        // libtorch's own headers warn by the hundred.
        .warnings(false);
    build_cuda(build.clone(), &include, &object);
    // Names of Gloo, whose headers libtorch's packages lack.
    build.include("cpp/group/names");
    // Three objects: what runs in training, the device of dry runs, whose kernels bear libtorch's own names, and ranks that
    // train together, which need c10d's headers.
    for (folder, name) in [("cpp", "shim.cpp"), ("cpp/dry", "dry.cpp"), ("cpp/group", "group.cpp")] {
        build.file(one_file(folder, object.with_file_name(name)));
    }
    build.compile("lora_torch_shim");
    // Dependents read this as DEP_LORA_TORCH_SHIM_LIBTORCH_LIB and embed it as run path.
    println!("cargo:libtorch_lib={}", lib.display());
    println!("cargo:rustc-env=LORA_LIBTORCH_LIB={}", lib.display());
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}

/// A file that includes all of a folder: reading libtorch's headers takes longer than compiling what is written here.
fn one_file(folder: &str, path: PathBuf) -> PathBuf {
    let folder = std::fs::read_dir(folder).expect("the sources are beside this script");
    let mut files: Vec<PathBuf> = folder.map(|entry| entry.expect("the folder can be read").path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "cpp"));
    files.sort();
    let full = |file: &PathBuf| file.canonicalize().expect("it was there a moment ago");
    let text: String = files.iter().map(|file| format!("#include {:?}\n", full(file))).collect();
    std::fs::write(&path, text).expect("cargo's folder can be written to");
    path
}

/// What calls CUDA by name. Its libraries are there only at run time, so that its symbols stay open until then.
fn build_cuda(mut build: cc::Build, libtorch: &Path, object: &Path) {
    let beside_torch = libtorch.join("../../nvidia/cu13/include");
    let toolkit = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let mut folders = std::iter::once(beside_torch).chain(toolkit.map(|folder| folder.join("include")));
    ["CUDA_HOME", "CUDA_PATH"].iter().for_each(|name| println!("cargo:rerun-if-env-changed={name}"));
    let Some(headers) = folders.find(|folder| CUDA_HEADERS.iter().all(|header| folder.join(header).exists())) else {
        println!("cargo:warning=built without CUDA graphs and kernels: the headers of CUDA 13 are not beside libtorch");
        return;
    };
    // The kernels travel as a text.
    let text = std::fs::read_to_string("cpp/cuda/whole.cu").expect("the kernels are beside this script");
    let folder = object.parent().expect("a file in a folder");
    std::fs::write(folder.join("whole_source.h"), format!("R\"cuda({text})cuda\"\n"))
        .expect("cargo's folder can be written to");
    build.include(&headers).include(folder).pic(true);
    // NCCL's header from no other place: it must be of the version that libtorch was built with.
    let nccl = libtorch.join("../../nvidia/nccl/include");
    let lacks = NCCL_HEADERS.iter().find(|header| ![&headers, &nccl].iter().any(|folder| folder.join(header).exists()));
    match lacks {
        None => _ = build.include(nccl).define("LORA_NCCL", None),
        // A libtorch for machines without a GPU has none of it.
        Some(header) if nccl.exists() => {
            println!(
                "cargo:warning=built without NCCL: {header} is not beside libtorch (wheels nvidia-nccl-cu13, nvidia-cuda-cccl)"
            );
        }
        Some(_) => {}
    }
    let mut command = build.get_compiler().to_command();
    let sources = ["cpp/cuda/graph.cpp", "cpp/cuda/kernels.cpp", "cpp/cuda/limit.cpp", "cpp/cuda/nccl.cpp"];
    command.arg("-shared").args(sources).arg("-ldl").arg("-o").arg(object);
    let done = command.status().expect("the C++ compiler runs");
    assert!(done.success(), "{command:?} failed");
}
