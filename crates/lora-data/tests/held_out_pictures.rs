//! Pictures that are held out, pictures that turn out unusable, and pictures that are others than they were.

use std::path::Path;

use lora_core::random::Stream;
use lora_data::bucket::Framing;
use lora_data::finding::FindingKind;
use lora_data::processor::ProcessorRegistry;
use lora_data::source::{Example, HeldOut, Source};
use lora_data::{DatasetOptions, MaskOptions, Pictures};

/// Three pictures of grey stripes in a folder.
fn striped() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.png", "b.png", "c.png"] {
        let stripes = image::RgbImage::from_fn(48, 16, |x, _| image::Rgb([5 * x as u8; 3]));
        stripes.save(folder.path().join(name)).unwrap();
    }
    folder
}

fn open(options: DatasetOptions) -> Pictures {
    Pictures::open(vec![options], &ProcessorRegistry::default()).unwrap()
}

#[test]
fn they_are_cut_in_the_middle_and_nothing_is_random() {
    let folder = striped();
    let of = |processors: &[&str]| {
        let processors = processors.iter().map(|&name| name.to_owned()).collect();
        open(DatasetOptions { framing: Framing::Fixed((16, 16)), processors, ..DatasetOptions::of(folder.path()) })
    };
    let expected = of(&["center_crop"]).example(0, &Stream::new(0)).unwrap();
    for processors in [&["center_crop", "flip", "color_jitter"][..], &["random_crop"], &["flip", "random_crop"]] {
        let mut pictures = of(processors);
        let another = pictures.of_another(folder.path()).unwrap();
        let held_out = pictures.hold_out(HeldOut::Records(1), 3).unwrap();
        assert!(pictures.is_random() && !another.is_random() && !held_out.is_random());
        for seed in 0..8 {
            assert_eq!(another.example(0, &Stream::new(seed)).unwrap(), expected, "{processors:?}");
            assert_eq!(held_out.example(0, &Stream::new(seed)).unwrap(), expected, "{processors:?}");
        }
    }
    // The part that another processor chose stays.
    let corner = of(&["top_left_crop"]).example(0, &Stream::new(0)).unwrap();
    let another = of(&["top_left_crop", "flip"]).of_another(folder.path()).unwrap();
    assert_eq!(another.example(0, &Stream::new(1)).unwrap(), corner);
}

#[test]
fn a_mask_is_not_that_of_a_held_out_picture_of_the_same_name() {
    let (folder, other, masks) = (striped(), striped(), striped());
    std::fs::rename(other.path().join("c.png"), other.path().join("d.png")).unwrap();
    std::fs::copy(masks.path().join("c.png"), masks.path().join("d.png")).unwrap();
    let mut options = DatasetOptions::of(folder.path());
    options.framing = Framing::Fixed((16, 16));
    options.scan.mask_dir = Some(masks.path().to_owned());
    options.masks.enabled = true;
    let pictures = open(options);
    let masked = |path: &Path| -> Vec<bool> {
        let another = pictures.of_another(path).unwrap();
        let example = |item| another.example(item, &Stream::new(0)).unwrap();
        (0..3).map(|item| matches!(example(item), Example::Picture(sample) if sample.mask.is_some())).collect()
    };
    assert_eq!(masked(other.path()), [false, false, true]);
    assert_eq!(masked(folder.path()), [true; 3]);
}

#[test]
fn a_damaged_mask_is_told_by_its_own_name() {
    let folder = striped();
    let mask = folder.path().join("b-mask.png");
    image::RgbImage::new(48, 16).save(&mask).unwrap();
    let masks = MaskOptions { enabled: true, ..MaskOptions::default() };
    let mut pictures = open(DatasetOptions { masks, ..DatasetOptions::of(folder.path()) });
    let bytes = std::fs::read(&mask).unwrap();
    std::fs::write(&mask, &bytes[..bytes.len() / 2]).unwrap();
    let error = pictures.example(1, &Stream::new(0)).unwrap_err();
    pictures.leave_out(vec![(1, error)]);
    let finding = pictures.findings().last().unwrap();
    assert_eq!((&finding.path, finding.kind), (&mask, FindingKind::Unreadable));
    assert!(finding.detail.contains("b.png is left out"), "{finding}");
}

#[test]
fn other_files_of_the_same_names_and_sizes_are_other_data() {
    let folder = striped();
    let mask = folder.path().join("b-mask.png");
    image::RgbImage::new(48, 16).save(&mask).unwrap();
    let identity = |enabled| {
        let masks = MaskOptions { enabled, ..MaskOptions::default() };
        open(DatasetOptions { masks, ..DatasetOptions::of(folder.path()) }).identity()
    };
    let before = [identity(false), identity(true)];
    assert_eq!(before, [identity(false), identity(true)]);
    image::RgbImage::from_fn(48, 16, |x, y| image::Rgb([(x * y) as u8; 3])).save(&mask).unwrap();
    assert_eq!((before[0] == identity(false), before[1] == identity(true)), (true, false), "masks that are in use");
    image::RgbImage::from_fn(48, 16, |x, y| image::Rgb([(x * y) as u8; 3])).save(folder.path().join("a.png")).unwrap();
    assert_ne!(before[0], identity(false));
}
