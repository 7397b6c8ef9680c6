//! What happens to a picture and a caption before training.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lora_core::random::Stream;
use lora_data::RgbPicture;
use lora_data::crop::CropPlan;
use lora_data::tokenizer::{ClipTokenizer, TextCleaning};

fn picture(width: usize, height: usize) -> RgbPicture {
    let mut stream = Stream::new(0);
    let data = (0..width * height * 3).map(|_| stream.next_u32() as u8).collect();
    RgbPicture::new(width, height, data).expect("as many bytes as pixels")
}

fn pictures(criterion: &mut Criterion) {
    let source = picture(2048, 1536);
    criterion.bench_function("crop 3.1 MP to 512x512", |bencher| {
        let plan = CropPlan::center((2048, 1536), (512, 512));
        bencher.iter(|| plan.apply(&source).expect("the plan fits"));
    });
    let cut = picture(512, 512);
    criterion.bench_function("512x512 to planar f32", |bencher| bencher.iter(|| cut.to_planar()));
}

fn captions(criterion: &mut Criterion) {
    let tokenizer = ClipTokenizer::new(TextCleaning::Ftfy);
    let caption = "masterpiece, best quality, 1girl, solo, long hair, looking at viewer, 一只红色的苹果，放在桌子上";
    tokenizer.encode(caption);
    let mut group = criterion.benchmark_group("tokenizer");
    group.throughput(Throughput::Elements(1));
    group.bench_function("one caption", |bencher| bencher.iter(|| tokenizer.rows(caption, 1)));
    group.finish();
}

fn noise(criterion: &mut Criterion) {
    criterion.bench_function("noise for one 512 px picture", |bencher| {
        bencher.iter(|| Stream::new(42).at("noise").with(3).normals(4 * 64 * 64));
    });
}

criterion_group!(benches, pictures, captions, noise);
criterion_main!(benches);
