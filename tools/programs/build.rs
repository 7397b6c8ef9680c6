//! Lets the examples find libtorch without LD_LIBRARY_PATH.

fn main() {
    if let Ok(folder) = std::env::var("DEP_LORA_TORCH_SHIM_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
