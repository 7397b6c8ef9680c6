//! Adapter file formats: each a reader into and a writer from the canonical [`lora_core::Adapter`].

pub mod kohya;
