//! Lets this package's program and tests find libtorch without LD_LIBRARY_PATH: in `lib` beside the program, as in an archive of
//! `make dist`, and where it was when it was built, unless `LORA_RELOCATABLE` says that the program goes to other machines.

fn main() {
    println!("cargo:rerun-if-env-changed=LORA_RELOCATABLE");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/lib");
    }
    if let Ok(folder) = std::env::var("DEP_LORA_TORCH_SHIM_LIBTORCH_LIB")
        && std::env::var_os("LORA_RELOCATABLE").is_none()
    {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
