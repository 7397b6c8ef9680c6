//! Counting libtorch's host allocations. One test, alone in its process: whatever another thread allocates counts too.

use lora_torch::memory::{count_host_allocations, host_allocations, reset_host_peak};
use lora_torch::tch::{Device, Kind, Tensor, no_grad_guard};

const FLOATS: (Kind, Device) = (Kind::Float, Device::Cpu);

fn now() -> (u64, u64) {
    let held = host_allocations().unwrap();
    (held.live, held.peak)
}

#[test]
fn bytes_are_counted_exactly() {
    assert_eq!(host_allocations(), None, "nothing is counted unasked");
    let before = Tensor::zeros([1000], FLOATS);
    count_host_allocations().unwrap();
    count_host_allocations().unwrap();
    assert_eq!(now(), (0, 0));
    // One from before is freed by its own allocator.
    drop(before);
    assert_eq!(now(), (0, 0));

    let a = Tensor::zeros([1000], FLOATS);
    assert_eq!(now(), (4000, 4000));
    assert!(a.data_ptr().addr().is_multiple_of(64), "vector instructions need aligned memory");
    let view = a.view([10, 100]);
    assert_eq!(now(), (4000, 4000), "a view owns nothing");
    // An operation without a number beside it, which would be a tensor too for as long as the call takes.
    let b = a.cos();
    assert_eq!(now(), (8000, 8000));
    drop(a);
    assert_eq!(now(), (8000, 8000), "the view holds on to it");
    drop(view);
    assert_eq!(now(), (4000, 8000));
    reset_host_peak();
    assert_eq!(now(), (4000, 4000));
    assert_eq!(f64::try_from(b.sum(Kind::Float)).unwrap(), 1000.0);
    drop(b);

    // Tensors of nothing, and growing in place: the storage asks its own allocator again.
    drop(Tensor::zeros([0], FLOATS));
    let mut grown = Tensor::ones([10], FLOATS);
    let _ = grown.resize_([1000]);
    assert_eq!(now().0, 4000);
    assert_eq!(f64::try_from(grown.narrow(0, 0, 10).sum(Kind::Float)).unwrap(), 10.0);
    drop(grown);
    assert_eq!(now().0, 0);

    // What a graph keeps, and that nothing is lost or counted twice through it.
    reset_host_peak();
    let weight = Tensor::ones([256, 256], FLOATS).set_requires_grad(true);
    let held = now().0;
    let output = weight.tanh().sum(Kind::Float);
    assert_eq!(now().0 - held, 4 * 256 * 256 + 4, "tanh keeps its result");
    output.backward();
    drop(output);
    assert_eq!(now().0 - held, 4 * 256 * 256, "the gradient is left");
    drop(weight);
    assert_eq!(now().0, 0);

    // Threads add up, and an allocation may be freed by another thread than its own.
    let _guard = no_grad_guard();
    let made: Vec<_> = (0..4).map(|_| std::thread::spawn(|| Tensor::zeros([1 << 20], FLOATS))).collect();
    let made: Vec<Tensor> = made.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert_eq!(now().0, 4 * (4 << 20));
    drop(made);
    assert_eq!(now().0, 0);

    let refused = Tensor::f_zeros([i64::MAX / 8], FLOATS);
    assert!(refused.is_err());
    assert_eq!(now().0, 0, "what was refused is not counted");
}
