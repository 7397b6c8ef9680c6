//! A frozen weight computes what the whole weight computes, forward and backward, in every storage and place.

use super::*;

const ALL: [(Storage, f64); 5] = [
    (Storage::Half, 6e-4),
    (Storage::BFloat16, 5e-3),
    (Storage::Float8, 7e-2),
    (Storage::Int8, 1e-2),
    // Half of the widest gap between codes, -1 to -0.696, and what the factor's own 8 bits lose.
    (Storage::Nf4, 0.17),
];

fn random(shape: &[i64]) -> Tensor {
    crate::seed(7);
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

fn largest(tensor: &Tensor) -> f64 {
    tensor.abs().max().double_value(&[])
}

#[test]
fn storages_round_as_they_say() {
    let weight = random(&[16, 24]) * random(&[16, 1]).abs();
    for (storage, tolerance) in ALL {
        let own = FrozenWeight::stored(&weight, storage).unwrap();
        // What shares a largest value: an output, or a block of 64.
        let together = if storage == Storage::Nf4 { [6, 64] } else { [16, 24] };
        let most = weight.view(together).abs().amax([1i64], true);
        // Integers err by half a step of that, floats by a share of the value.
        let error = largest(&((own.whole().unwrap() - &weight).view(together) / &most));
        assert!(error > 0.0 && error < tolerance, "{storage:?}: {error}");
        assert_eq!(own.kind(), Kind::Float);
    }
    let bytes = |storage| FrozenWeight::stored(&weight, storage).unwrap().bytes();
    assert_eq!((bytes(Storage::Half), bytes(Storage::Int8)), (2 * 384, 384 + 64));
    assert_eq!(bytes(Storage::Nf4), 384 / 2 + 6 + 4 + 4);
    // By hand: the largest is 127 steps.
    let own = FrozenWeight::stored(&Tensor::from_slice(&[2.54f32, -1.27, 0.02, 0.0]).view([1, 4]), Storage::Int8);
    let own = own.unwrap();
    let Stored::Scaled { values, .. } = &own.stored else { panic!("{own:?}") };
    assert_eq!(Vec::<i8>::try_from(values.view([-1])).unwrap(), [127, -64, 1, 0]);
    let zeros = FrozenWeight::stored(&Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)), Storage::Int8).unwrap();
    assert_eq!(largest(&zeros.whole().unwrap()), 0.0);
}

/// The same arithmetic on the same whole weight, so that it is the same to the bit, but where sums are taken in
/// another order: tiles of large weights, and libtorch's own backward pass of a convolution.
#[test]
fn outputs_and_gradients_are_those_of_the_whole_weight() {
    let grouped =
        LayerGeometry::Conv2d { in_channels: 6, out_channels: 10, kernel: 3, stride: 1, padding: 1, groups: 2 };
    let layers = [
        (LayerGeometry::linear(6, 10), vec![2, 5, 6], true),
        (LayerGeometry::conv2d(6, 10, 3, 1, 1), vec![2, 6, 7, 9], false),
        (LayerGeometry::conv2d(6, 10, 3, 2, 1), vec![2, 6, 8, 9], false),
        (LayerGeometry::conv2d(6, 10, 1, 1, 0), vec![1, 6, 4, 4], false),
        (grouped, vec![2, 6, 5, 4], false),
        // Two tiles, of rows that do not begin a block of NF4 each.
        (LayerGeometry::linear(2050, 1100), vec![3, 2050], false),
        (LayerGeometry::conv2d(250, 1024, 3, 1, 1), vec![1, 250, 3, 3], false),
    ];
    for (geometry, shape, exact) in layers {
        let weight_shape: Vec<i64> = geometry.weight_shape().iter().map(|&side| side as i64).collect();
        let (weight, bias) = (random(&weight_shape) * 0.1, random(&[weight_shape[0]]));
        let stored = ALL.map(|(storage, _)| FrozenWeight::stored(&weight, storage).unwrap());
        for own in stored.into_iter().chain([FrozenWeight::plain(weight.shallow_clone())]) {
            let (a, b) = (random(&shape).set_requires_grad(true), random(&shape).set_requires_grad(true));
            let output = own.apply(&geometry, &a, Some(&bias)).unwrap();
            let expected = apply_layer(&geometry, &b, &own.whole().unwrap(), Some(&bias)).unwrap();
            let toward = random(&output.size());
            (&output * &toward).sum(Kind::Float).backward();
            (&expected * &toward).sum(Kind::Float).backward();
            for (own, expected) in [(output, expected), (a.grad(), b.grad())] {
                let apart = largest(&(&own - &expected)) / largest(&expected);
                assert!(apart <= if exact { 0.0 } else { 2e-6 }, "{geometry:?} {apart}");
            }
        }
    }
    let wrong = FrozenWeight::stored(&random(&[10, 6]), Storage::Int8).unwrap();
    assert!(wrong.apply(&LayerGeometry::linear(6, 10), &random(&[2, 7]), None).is_err());
}

/// The same sums, but for the order of additions.
#[test]
fn a_low_rank_update_is_that_of_its_products() {
    for (inputs, outputs, lead) in [(6, 10, vec![2, 5]), (2050, 1100, vec![3]), (64, 48, vec![1, 2, 3])] {
        let weight = random(&[outputs, inputs]) * 0.1;
        let stored = ALL.map(|(storage, _)| FrozenWeight::stored(&weight, storage).unwrap());
        for (own, scale) in stored
            .into_iter()
            .chain([FrozenWeight::plain(weight.shallow_clone())])
            .zip([1.0, 0.5, 3.0].into_iter().cycle())
        {
            let bias = (scale != 0.5).then(|| random(&[outputs]));
            let shape = [&lead[..], &[inputs]].concat();
            let leaves = || {
                [random(&shape), random(&[4, inputs]), random(&[outputs, 4])].map(|leaf| leaf.set_requires_grad(true))
            };
            let ([a, down, up], others) = (leaves(), leaves());
            let output = own.apply_low_rank(&a, bias.as_ref(), &down, &up, scale).unwrap();
            let [b, other_down, other_up] = &others;
            let update = b.linear(other_down, None::<&Tensor>).linear(other_up, None::<&Tensor>) * scale;
            let expected = b.linear(&own.whole().unwrap(), bias.as_ref()) + update;
            let toward = random(&output.size());
            (&output * &toward).sum(Kind::Float).backward();
            (&expected * &toward).sum(Kind::Float).backward();
            let pairs = [(&a, b), (&down, other_down), (&up, other_up)].map(|(own, other)| (own.grad(), other.grad()));
            for (own, expected) in [(output, expected)].into_iter().chain(pairs) {
                let apart = largest(&(&own - &expected)) / largest(&expected);
                assert!(own.size() == expected.size() && apart < 4e-6, "{inputs} {scale}: {apart}");
            }
        }
    }
    // Of factors alone: an input without a gradient, as the captions' are, gets none.
    let own = FrozenWeight::plain(random(&[10, 6]).to_kind(Kind::BFloat16));
    let [input, down, up] = [[7, 6], [2, 6], [10, 2]].map(|shape| random(&shape).to_kind(Kind::BFloat16));
    let down = down.set_requires_grad(true);
    let output = own.apply_low_rank(&input, None, &down, &up, 1.0).unwrap();
    output.sum(Kind::Float).backward();
    assert!(
        output.kind() == Kind::BFloat16 && down.grad().defined() && !input.grad().defined() && !up.grad().defined()
    );
    assert!(own.apply_low_rank(&input, None, &up, &down, 1.0).is_err());
}

/// Random blocks with factors from 1e-3 to 0.1, as weights have them.
fn random_blocks(blocks: BlockKind, shape: [usize; 2]) -> Vec<u8> {
    let (size, factors) = match blocks {
        BlockKind::Q4_0 | BlockKind::Q5_0 | BlockKind::Q8_0 => (blocks.block().1, &[0][..]),
        BlockKind::Q6_K => (blocks.block().1, &[208][..]),
        _ => (blocks.block().1, &[0, 2][..]),
    };
    let mut stream = lora_core::random::Stream::new(blocks.gguf().into());
    let mut bytes: Vec<u8> = (0..blocks.bytes(shape).unwrap()).map(|_| stream.next_u32() as u8).collect();
    for block in bytes.chunks_exact_mut(size) {
        for &place in factors {
            let factor = half::f16::from_f32(1e-3 + 0.099 * stream.next_u32() as f32 / u32::MAX as f32);
            block[place..place + 2].copy_from_slice(&factor.to_le_bytes());
        }
    }
    bytes
}

/// What runs where there are no loops, tried on the CPU: several chunks, and tiles.
#[test]
fn blocks_by_libtorchs_operations_are_those_of_the_loops() {
    for blocks in BlockKind::ALL {
        for (shape, kind) in
            [([3, 512], Kind::Half), ([1100, 4096], Kind::BFloat16), ([2, 768], Kind::Float), ([1, 256], Kind::Float)]
        {
            let bytes = random_blocks(blocks, shape);
            let own = FrozenWeight::packed(&bytes, blocks, shape, kind, Device::Cpu).unwrap();
            let mut other = FrozenWeight::packed(&bytes, blocks, shape, kind, Device::Cpu).unwrap();
            let Stored::Blocks { portable, .. } = &mut other.stored else { panic!("{other:?}") };
            *portable = true;
            assert!(own.whole().unwrap().equal(&other.whole().unwrap()), "{blocks} {shape:?} {kind:?}");
        }
    }
}

#[test]
fn layers_in_blocks_compute_what_their_whole_weights_do() {
    let staging = Staging::new(Device::Cpu).unwrap();
    let layers = BlockKind::ALL.map(|blocks| {
        // Two tiles.
        let shape = [1100, 2048];
        let bytes = random_blocks(blocks, shape);
        let own = FrozenWeight::packed(&bytes, blocks, shape, Kind::Float, Device::Cpu).unwrap();
        let whole = own.whole().unwrap();
        (blocks, own.staged(&staging).unwrap(), whole)
    });
    for (blocks, own, whole) in layers {
        let (a, b) = (random(&[3, 2048]).set_requires_grad(true), random(&[3, 2048]).set_requires_grad(true));
        let output = own.apply(&LayerGeometry::linear(2048, 1100), &a, None).unwrap();
        let expected = b.linear(&whole, None::<&Tensor>);
        let toward = random(&[3, 1100]);
        (&output * &toward).sum(Kind::Float).backward();
        (&expected * &toward).sum(Kind::Float).backward();
        for (own, expected) in [(output, expected), (a.grad(), b.grad())] {
            let apart = largest(&(&own - &expected)) / largest(&expected);
            assert!(apart < 2e-6, "{blocks}: {apart}");
        }
    }
}

#[test]
fn an_embedding_looks_up_rows_of_the_whole_weight() {
    let weight = random(&[20, 256]);
    let words = Tensor::from_slice(&[3i64, 0, 19, 3, 7, 7]).view([2, 3]);
    let mut all: Vec<FrozenWeight> =
        ALL.iter().map(|&(storage, _)| FrozenWeight::stored(&weight, storage).unwrap()).collect();
    all.push(FrozenWeight::plain(weight.shallow_clone()));
    all.push(FrozenWeight::float8(weight.to_kind(Kind::Float8e4m3fn), None, Kind::BFloat16).unwrap());
    all.extend(BlockKind::ALL.map(|blocks| {
        let bytes = random_blocks(blocks, [20, 256]);
        FrozenWeight::packed(&bytes, blocks, [20, 256], Kind::BFloat16, Device::Cpu).unwrap()
    }));
    let staging = Staging::new(Device::Cpu).unwrap();
    let bytes = random_blocks(BlockKind::Q8_0, [20, 256]);
    let staged = FrozenWeight::packed(&bytes, BlockKind::Q8_0, [20, 256], Kind::Half, Device::Cpu).unwrap();
    all.push(staged.staged(&staging).unwrap());
    for own in &all {
        let found = own.embed(&words).unwrap();
        let expected = own.whole().unwrap().index_select(0, &words.view([-1])).view([2, 3, 256]);
        assert!(found.equal(&expected) && found.kind() == own.kind(), "{own:?}");
    }
    assert!(all[0].embed(&(&words + 1)).is_err());
    assert!(FrozenWeight::plain(random(&[2, 2, 2])).embed(&words).is_err());
}

#[test]
fn numbers_of_8_bits_come_from_a_file_as_they_are() {
    let whole = random(&[6, 10]);
    let values = whole.to_kind(Kind::Float8e4m3fn);
    let back = values.to_kind(Kind::Float);
    let of = |scale: Option<&Tensor>| FrozenWeight::float8(values.shallow_clone(), scale, Kind::Float);
    assert!(of(None).unwrap().whole().unwrap().equal(&back));
    let one = Tensor::from(0.25f32);
    assert!(of(Some(&one)).unwrap().whole().unwrap().equal(&(&back * &one)));
    assert!(of(Some(&one.view([1]))).unwrap().whole().unwrap().equal(&(&back * &one)));
    let each = random(&[6, 1]);
    assert!(of(Some(&each)).unwrap().whole().unwrap().equal(&(&back * &each)));
    assert!(of(Some(&each.view([6]))).unwrap().whole().unwrap().equal(&(&back * &each)));
    let output = of(Some(&each)).unwrap().apply(&LayerGeometry::linear(10, 6), &random(&[2, 10]), None).unwrap();
    assert_eq!(output.size(), [2, 6]);
    // A factor for each tile of a matrix, and values of another type.
    for refused in [of(Some(&random(&[3, 2]))), FrozenWeight::float8(whole, None, Kind::Float)] {
        assert!(matches!(refused, Err(Error::Storage { storage: Storage::Float8, .. })));
    }
}

unsafe extern "C" {
    fn lora_host_scaled(
        bytes: *const c_void,
        fp8: c_int,
        scale: *const f32,
        row: i64,
        count: i64,
        kind: c_int,
        values: *mut c_void,
    ) -> c_int;
    fn lora_host_blocks(
        packed: *const c_void,
        blocks: c_int,
        numbers: c_int,
        size: c_int,
        count: i64,
        kind: c_int,
        values: *mut c_void,
    ) -> c_int;
}

/// CUDA's kernel, compiled for the host.
#[test]
fn the_kernel_of_blocks_gives_the_numbers_of_the_loops() {
    for blocks in BlockKind::ALL {
        for (number, kind) in [Kind::Float, Kind::Half, Kind::BFloat16].into_iter().enumerate() {
            let shape = [5, 768];
            let bytes = random_blocks(blocks, shape);
            let own = FrozenWeight::packed(&bytes, blocks, shape, kind, Device::Cpu).unwrap();
            let found = Tensor::empty([5, 768], (kind, Device::Cpu));
            let (numbers, size) = blocks.block();
            // SAFETY: bytes of whole blocks, and a contiguous tensor of as many numbers.
            crate::shim::checked(unsafe {
                lora_host_blocks(
                    bytes.as_ptr().cast(),
                    blocks.gguf() as c_int,
                    numbers as c_int,
                    size as c_int,
                    found.numel() as i64,
                    number as c_int,
                    found.data_ptr(),
                )
            })
            .unwrap();
            assert!(found.equal(&own.whole().unwrap()), "{blocks} {kind:?}");
        }
    }
}

/// On a machine with a GPU: the kernel gives the bits of the CPU's loops, and nothing else runs.
#[test]
fn the_kernel_of_blocks_gives_the_same_numbers() {
    if !matches!(crate::device::cuda(), crate::device::CudaStatus::Available(_)) {
        println!("not run: {}", crate::device::cuda());
        return;
    }
    for blocks in BlockKind::ALL {
        for (shape, kind) in [([5, 768], Kind::Float), ([1100, 2048], Kind::Half), ([3, 256], Kind::BFloat16)] {
            let bytes = random_blocks(blocks, shape);
            let of = |device| FrozenWeight::packed(&bytes, blocks, shape, kind, device).unwrap();
            let (there, expected) = (of(Device::Cuda(0)), of(Device::Cpu).whole().unwrap());
            drop(there.whole().unwrap());
            let (found, counted) = crate::profile::operations(|| there.whole().unwrap()).unwrap();
            assert!(found.to_device(Device::Cpu).equal(&expected), "{blocks} {shape:?} {kind:?}");
            assert_eq!(counted.total().work, 0, "{:?}", counted.by_name);
        }
    }
}

/// CUDA's kernels, compiled for the host.
#[test]
fn the_kernels_arithmetic_is_that_of_libtorchs_operations() {
    for storage in [Storage::Int8, Storage::Float8] {
        for shape in [vec![40, 12, 3, 3], vec![77, 65], vec![300, 320], vec![1, 3]] {
            for (number, kind) in [Kind::Float, Kind::Half, Kind::BFloat16].into_iter().enumerate() {
                let weight = Tensor::randn(&*shape, (Kind::Float, Device::Cpu)).to_kind(kind);
                let own = FrozenWeight::stored(&weight, storage).unwrap();
                let Stored::Scaled { values, scale } = &own.stored else { panic!("{storage}") };
                let found = Tensor::empty(&*shape, (kind, Device::Cpu));
                let row = weight.numel() as i64 / shape[0];
                // SAFETY: contiguous tensors of the sizes that are said.
                crate::shim::checked(unsafe {
                    lora_host_scaled(
                        values.data_ptr(),
                        (storage == Storage::Float8).into(),
                        scale.data_ptr().cast(),
                        row,
                        weight.numel() as i64,
                        number as c_int,
                        found.data_ptr(),
                    )
                })
                .unwrap();
                assert_eq!(found, own.whole().unwrap(), "{storage} {shape:?} {kind:?}");
            }
        }
    }
}

/// As if the CPU were elsewhere: rows are looked up in host memory, and all else is done with the weight fetched.
#[test]
fn what_waits_in_host_memory_gives_the_same_numbers() {
    let weight = random(&[70, 64]);
    let words = Tensor::from_slice(&[3i64, 69, 0, 3, 12, 12]).view([2, 3]);
    let (geometry, input) = (LayerGeometry::linear(64, 70), random(&[3, 64]));
    for storage in [Storage::BFloat16, Storage::Int8, Storage::Float8, Storage::Nf4] {
        let own = FrozenWeight::stored(&weight, storage).unwrap();
        let waiting = FrozenWeight { waits: Some(Device::Cpu), ..own.shallow_clone() };
        assert_eq!(
            waiting.embed(&words).unwrap(),
            own.whole().unwrap().index_select(0, &words.view([-1])).view([2, 3, 64])
        );
        assert_eq!(waiting.whole().unwrap(), own.whole().unwrap());
        let [one, other] = [&waiting, &own].map(|weight| weight.apply(&geometry, &input, None).unwrap());
        assert_eq!(one, other);
        assert_eq!(waiting.shallow_clone().device(), Device::Cpu);
    }
}

/// On a machine with a GPU: the kernels give the bits of libtorch's operations, and nothing else runs.
#[test]
fn the_kernels_give_the_same_numbers() {
    if !matches!(crate::device::cuda(), crate::device::CudaStatus::Available(_)) {
        println!("not run: {}", crate::device::cuda());
        return;
    }
    for storage in [Storage::Int8, Storage::Float8] {
        for (shape, kind) in [
            (vec![40, 12, 3, 3], Kind::Float),
            (vec![77, 65], Kind::Half),
            (vec![300, 320], Kind::BFloat16),
            (vec![1, 3], Kind::Half),
        ] {
            let weight = random(&shape).to_kind(kind);
            let expected = FrozenWeight::stored(&weight, storage).unwrap().whole().unwrap();
            let there = FrozenWeight::stored(&weight.to_device(Device::Cuda(0)), storage).unwrap();
            drop(there.whole().unwrap());
            let (found, counted) = crate::profile::operations(|| there.whole().unwrap()).unwrap();
            assert_eq!(found.to_device(Device::Cpu), expected, "{storage} {shape:?} {kind:?}");
            assert_eq!(counted.total().work, 0, "{:?}", counted.by_name);
        }
    }
}

#[test]
fn half_precision_computes_in_its_own_dtype() {
    let geometry = LayerGeometry::linear(64, 48);
    let weight = (random(&[48, 64]) * 0.1).to_kind(Kind::BFloat16);
    for storage in [Storage::Nf4, Storage::Int8, Storage::Float8] {
        let own = FrozenWeight::stored(&weight, storage).unwrap();
        let input = random(&[3, 64]).to_kind(Kind::BFloat16).set_requires_grad(true);
        let output = own.apply(&geometry, &input, None).unwrap();
        assert_eq!(output, input.linear(&own.whole().unwrap(), None::<&Tensor>));
        output.sum(Kind::Float).backward();
        assert_eq!((output.kind(), input.grad().kind()), (Kind::BFloat16, Kind::BFloat16));
    }
}

/// On a machine with a GPU: products of tiles go where they belong, and gradients are summed over them.
/// Held against the product in f64: rounding once, as one product does, and the parts' own roundings come to twice that
/// at most.
#[test]
fn gradients_of_many_tiles_are_about_as_exact_as_those_of_one() {
    let kind = Kind::BFloat16;
    // Sixteen tiles.
    let own = FrozenWeight::stored(&(random(&[32768, 1024]) / 32).to_kind(kind), Storage::Int8).unwrap();
    let input = random(&[4, 1024]).to_kind(kind).set_requires_grad(true);
    let output = own.apply(&LayerGeometry::linear(1024, 32768), &input, None).unwrap();
    let toward = random(&output.size()).to_kind(kind);
    (&output * &toward).sum(Kind::Float).backward();
    let exact = toward.to_kind(Kind::Double).matmul(&own.whole().unwrap().to_kind(Kind::Double));
    let error = |found: &Tensor| (found.to_kind(Kind::Double) - &exact).norm().double_value(&[]);
    let (once, found) = (error(&exact.to_kind(kind)), error(&input.grad()));
    assert!(found < 2.0 * once, "{} times the error of one rounding", found / once);
}

#[test]
fn tiles_on_a_device_give_the_products_of_the_whole() {
    if !matches!(crate::device::cuda(), crate::device::CudaStatus::Available(_)) {
        println!("not run: {}", crate::device::cuda());
        return;
    }
    // Two tiles.
    let (inputs, outputs) = (4096, 9000);
    let there = |shape: &[i64]| random(shape).to_device(Device::Cuda(0)).to_kind(Kind::BFloat16);
    let own = FrozenWeight::stored(&(there(&[outputs, inputs]) * 0.02), Storage::Nf4).unwrap();
    let bias = there(&[outputs]);
    for bias in [None, Some(&bias)] {
        let (a, toward) = (there(&[2, 7, inputs]).set_requires_grad(true), there(&[2, 7, outputs]));
        let b = a.detach().set_requires_grad(true);
        let output = own.apply(&LayerGeometry::linear(inputs as usize, outputs as usize), &a, bias).unwrap();
        let expected = b.linear(&own.whole().unwrap(), bias);
        (&output * &toward).sum(Kind::Float).backward();
        (&expected * &toward).sum(Kind::Float).backward();
        for (own, expected) in [(output, expected), (a.grad(), b.grad())] {
            let apart = largest(&(&own - &expected)) / largest(&expected);
            assert!(apart < 0.02, "{apart}");
        }
    }
}
