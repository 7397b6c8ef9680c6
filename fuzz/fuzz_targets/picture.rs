#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lora_fuzz::data::picture(bytes));
