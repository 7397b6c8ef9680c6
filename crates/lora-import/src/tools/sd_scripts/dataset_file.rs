//! Keys of sd-scripts' and musubi-tuner's dataset files. Those that the command line has too stand in [`super::data`].

use super::data::{bucket_steps, processors, resolution};
use crate::outcome::translated;
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};

/// All of them.
pub(crate) static ROWS: &[Row] = &[
    same("image_dir", "train_data_dir", Kind::Text),
    by("image_directory", &["train_data_dir", "caption_lines"], "its pictures, with all lines of captions", |field| {
        translated(
            vec![("train_data_dir", field.text().into()), ("caption_lines", "all".into())],
            "with all lines of captions",
        )
    }),
    same("metadata_file", "metadata_file", Kind::Text),
    same("conditioning_data_dir", "mask_dir", Kind::Text),
    same("is_reg", "is_reg", Kind::Switch),
    same("class_tokens", "class_tokens", Kind::Text),
    same("num_repeats", "repeats", Kind::Count),
    by("resolution", &["max_resolution"], "an area where there are buckets, there and here", resolution),
    same("batch_size", "batch_size", Kind::Count),
    same("enable_bucket", "enable_bucket", Kind::Switch),
    same("min_bucket_reso", "min_bucket_reso", Kind::Count),
    same("max_bucket_reso", "max_bucket_reso", Kind::Count),
    by("bucket_reso_steps", &["bucket_reso_steps"], "multiples of 8", bucket_steps),
    same("bucket_no_upscale", "bucket_no_upscale", Kind::Switch),
    same("shuffle_caption", "shuffle_caption", Kind::Switch),
    same("caption_separator", "caption_separator", Kind::Text),
    same("keep_tokens", "keep_tokens", Kind::Count),
    same("keep_tokens_separator", "keep_tokens_separator", Kind::Text),
    same("secondary_separator", "secondary_separator", Kind::Text),
    same("enable_wildcard", "enable_wildcard", Kind::Switch),
    same("caption_prefix", "caption_prefix", Kind::Text),
    same("caption_suffix", "caption_suffix", Kind::Text),
    same("caption_dropout_rate", "caption_dropout_rate", Kind::Number),
    same("caption_dropout_every_n_epochs", "caption_dropout_every_n_epochs", Kind::Count),
    same("caption_tag_dropout_rate", "caption_tag_dropout_rate", Kind::Number),
    same("caption_extension", "caption_extension", Kind::Text),
    super::data::ALPHA_MASK,
    by("flip_aug", &["processors"], "`flip`", processors),
    by("color_aug", &["processors"], "`color_jitter`", processors),
    by("random_crop", &["processors"], "`random_crop`", processors),
    gone("face_crop_aug_range", OFF, "no crops around faces"),
    same("token_warmup_min", "token_warmup_min", Kind::Count),
    same("token_warmup_step", "token_warmup_step", Kind::Number),
    gone("network_multiplier", &["1"], "the adapter counts fully for each dataset"),
    gone(
        "validation_split",
        &["0"],
        "nothing of this dataset alone is held out; `validation_split` of the whole run does it",
    ),
    gone("resize_interpolation", &["\"lanczos\"", "null"], "pictures are always resized with Lanczos filters"),
    gone("custom_attributes", OFF, "nothing reads them"),
    nothing("validation_seed", "which pictures are held out, `seed` says"),
    // musubi-tuner's, whose datasets have no subsets.
    gone("image_jsonl_file", OFF, "paths and captions in this form are not read; put captions beside their pictures"),
    gone("video_directory video_jsonl_file", OFF, "films are not trained on"),
    gone("control_directory multiple_target", OFF, "no pictures beside the captions"),
    nothing("cache_directory", "`cache_dir` keeps what is encoded for the next run"),
    nothing("skip_corrupted_cache debug_dataset", "a cache is never stale"),
    nothing(
        "target_frames frame_extraction frame_stride frame_sample max_frames source_fps no_resize_control \
         control_resolution fp_latent_window_size fp_1f_clean_indices fp_1f_target_index fp_1f_no_post",
        "a key of other kinds of datasets",
    ),
    nothing("cache_info", "headers are read each time"),
];
