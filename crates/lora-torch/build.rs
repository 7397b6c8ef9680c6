//! Compiles the C++ shim against the libtorch that torch-sys found, and tells dependents where that libtorch is.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
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
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("cpp/allocations.cpp")
        .file("cpp/shim.cpp")
        .file("cpp/checkpoint.cpp")
        .file("cpp/fault.cpp")
        .file("cpp/frozen.cpp")
        .file("cpp/nf4.cpp")
        .file("cpp/norm_silu.cpp")
        .file("cpp/profile.cpp")
        .file("cpp/staging.cpp")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        // As libtorch itself was built: some of its objects have other members without.
        .define("NDEBUG", None)
        // libtorch's own headers warn by the hundred.
        .warnings(false)
        .compile("lora_torch_shim");
    // Dependents read this as DEP_LORA_TORCH_SHIM_LIBTORCH_LIB and embed it as run path.
    println!("cargo:libtorch_lib={}", lib.display());
    println!("cargo:rustc-env=LORA_LIBTORCH_LIB={}", lib.display());
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}
