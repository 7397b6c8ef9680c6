//! What a training step asks of libtorch. One test, alone in its process, as operations of other threads would count too.
//!
//! `LORA_TEST_DEVICE=cuda` runs it on a GPU, where copies between host and device count as well.

mod common;

use lora_torch::profile::operations;

#[test]
fn the_host_waits_once_a_step() {
    let device = std::env::var("LORA_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
    // Loss, norm and overflow, in one piece; on the CPU they are there already.
    let allowed = u64::from(device != "cpu");
    let folder = common::workspace();
    let mut work = Vec::new();
    // Recorded steps are a few operations; what they are made of is counted here.
    let plain = ["max_train_steps=3", "cuda_graphs=false"];
    for keys in [
        &["gradient_accumulation_steps=1"][..],
        &["gradient_accumulation_steps=4"],
        &["base_storage=nf4", "gradient_checkpointing=true"],
        &["offload_base=true", "base_storage=int8"],
        &["train_text_encoder=false", "min_snr_gamma=5", "noise_offset=0.1"],
    ] {
        let mut session = common::prepare(folder.path(), &[keys, &plain[..]].concat());
        session.step().unwrap();
        for _ in 0..2 {
            let (report, counted) = operations(|| session.step().unwrap()).unwrap();
            assert!(report.is_some_and(|report| !report.skipped));
            let waits: Vec<_> = counted.by_name.iter().filter(|(_, own)| own.waits > 0).collect();
            assert!(counted.total().waits <= allowed, "{keys:?}: {waits:?}");
            work.push(counted.total().work);
        }
    }
    // Forward and backward are most of it: four of them are about four times the work. The optimiser's comes once, but from the
    // second on each gradient is an addition.
    assert!(work[2] > 3 * work[0] && work[2] < 5 * work[0], "{work:?}");
    assert_eq!(work[0], work[1], "the same every step");
    if device != "cpu" {
        let mut session = common::prepare(folder.path(), &["gradient_accumulation_steps=1", "max_train_steps=3"]);
        session.step().unwrap();
        let (_, counted) = operations(|| session.step().unwrap()).unwrap();
        assert_eq!((session.recorded_shapes(), counted.total().waits), (1, 1));
        assert!(counted.total().work * 20 < work[0], "{:?}", counted.by_name);
    }
}
