//! What happens to a picture and a caption before training.

use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lora_core::HostTensor;
use lora_core::random::Stream;
use lora_data::cache::DiskCache;
use lora_data::crop::CropPlan;
use lora_data::dataset::{ImageDataset, ScanOptions};
use lora_data::prefetch::{ahead, cores};
use lora_data::tokenizer::{ClipTokenizer, TextCleaning};
use lora_data::{Pictures, RgbPicture};
use lora_train::config::TrainConfig;

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

/// Photographs of 2 to 4 megapixels: those of the folder in `LORA_BENCH_PHOTOS`, or made here.
fn photographs() -> (Option<tempfile::TempDir>, std::path::PathBuf) {
    if let Some(folder) = std::env::var_os("LORA_BENCH_PHOTOS") {
        return (None, folder.into());
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    for seed in 0..24u64 {
        let mut random = Stream::new(seed);
        let waves: Vec<[f32; 4]> = (0..40).map(|_| std::array::from_fn(|_| random.uniform())).collect();
        let (width, height) = [(2048, 1536), (1440, 1920), (2000, 1333)][seed as usize % 3];
        // Sums of waves at all scales, and grain.
        let small = image::RgbImage::from_fn(width / 4, height / 4, |x, y| {
            let value = |shift: f32| {
                let sum: f32 = waves
                    .iter()
                    .enumerate()
                    .map(|(octave, [a, b, c, _])| {
                        let frequency = 0.004 * 1.13f32.powi(octave as i32);
                        ((a - 0.5) * frequency * x as f32 + (b - 0.5) * frequency * y as f32 + 6.3 * c + shift).sin()
                            / (1.0 + octave as f32 / 4.0)
                    })
                    .sum();
                (128.0 + 25.0 * sum).clamp(0.0, 255.0) as u8
            };
            image::Rgb([value(0.0), value(0.3), value(0.9)])
        });
        let mut whole = image::imageops::resize(&small, width, height, image::imageops::FilterType::Triangle);
        for pixel in whole.pixels_mut() {
            let grain = (random.next_u32() % 17) as i16 - 8;
            pixel.0 = pixel.0.map(|value| (i16::from(value) + grain).clamp(0, 255) as u8);
        }
        let file = std::fs::File::create(folder.path().join(format!("{seed:02}.jpg"))).expect("a new file");
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(std::io::BufWriter::new(file), 88);
        whole.write_with_encoder(encoder).expect("the disk takes it");
    }
    let path = folder.path().to_owned();
    (Some(folder), path)
}

/// The way of a dataset: scanned, decoded, cut to its bucket and made a planar tensor, on all cores.
fn dataset(criterion: &mut Criterion) {
    let (_guard, folder) = photographs();
    let keys = ["enable_bucket=true"];
    let open = || {
        let (datasets, _) = TrainConfig::datasets_of(None, Some(&folder), &keys).expect("a good configuration");
        Arc::new(Pictures::open(datasets, &Default::default()).expect("pictures"))
    };
    let pictures = open();
    let count = pictures.items().len();
    let mut group = criterion.benchmark_group("dataset");
    group.sample_size(10);
    group.throughput(Throughput::Elements(count as u64));
    group.bench_function("photographs to bucketed tensors", |bencher| {
        bencher.iter(|| {
            let own = Arc::clone(&pictures);
            let tensors = ahead(0..count, cores(), 4 * cores(), move |index| {
                own.load(index, &Stream::new(0)).expect("a good picture").picture.to_planar()
            });
            tensors.map(|tensor| tensor.len()).sum::<usize>()
        });
    });
    group.bench_function("photographs scanned", |bencher| bencher.iter(&open));

    // Latents of 512 px, as they are cached on disk.
    let cached = tempfile::tempdir().expect("a temporary folder");
    let cache = Arc::new(DiskCache::open(cached.path()).expect("a new cache"));
    let part =
        || HostTensor::from_f32([1, 4, 64, 64], Stream::new(1).normals(4 * 64 * 64)).expect("as many as it says");
    let entry = [("mean".to_owned(), part()), ("log_variance".to_owned(), part())].into();
    for index in 0..1000usize {
        cache.put(&cache.key(&[&index.to_string()]), &entry).expect("the disk takes it");
    }
    group.throughput(Throughput::Elements(1000));
    group.bench_function("warm cache", |bencher| {
        bencher.iter(|| {
            let own = Arc::clone(&cache);
            let entries =
                ahead(0..1000usize, cores(), 4 * cores(), move |index| own.get(&own.key(&[&index.to_string()])));
            entries.filter(Option::is_some).count()
        });
    });
    group.finish();
}

/// A folder of very many small captioned pictures.
fn scan(criterion: &mut Criterion) {
    let count: usize = if std::env::var_os("LORA_BENCH_FULL").is_some() { 100_000 } else { 5_000 };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut png = std::io::Cursor::new(Vec::new());
    image::RgbImage::new(64, 48).write_to(&mut png, image::ImageFormat::Png).expect("memory takes it");
    for index in 0..count {
        std::fs::write(folder.path().join(format!("{index:06}.png")), png.get_ref()).expect("the disk takes it");
        std::fs::write(folder.path().join(format!("{index:06}.txt")), format!("picture, number {index}"))
            .expect("as above");
    }
    let mut group = criterion.benchmark_group("scan");
    group.sample_size(10);
    group.throughput(Throughput::Elements(count as u64));
    group.bench_function("captioned pictures", |bencher| {
        bencher
            .iter(|| ImageDataset::scan(folder.path(), &ScanOptions::default()).expect("good pictures").items().len());
    });
    group.finish();
}

criterion_group!(benches, pictures, captions, noise, dataset, scan);
criterion_main!(benches);
