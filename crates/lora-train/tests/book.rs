//! The documentation as a reader meets it: every page has a place in the book, links lead somewhere, and the configurations that it
//! shows are read as they stand.

use std::path::{Path, PathBuf};

use lora_train::config::{Format, TrainConfig};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All pages of `docs/` and the texts at the root.
fn pages() -> Vec<PathBuf> {
    let markdown = |folder: PathBuf| {
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|is| is == "md"))
    };
    markdown(root()).chain(markdown(root().join("docs"))).collect()
}

/// Text outside of fences, and what stands in them as (language, text).
fn parts(text: &str) -> (String, Vec<(String, String)>) {
    let (mut prose, mut fences, mut open) = (String::new(), Vec::new(), None::<(String, String)>);
    for line in text.lines() {
        match (&mut open, line.trim_start().strip_prefix("```")) {
            (None, Some(language)) => open = Some((language.trim().to_owned(), String::new())),
            (Some(_), Some(_)) => fences.extend(open.take()),
            (Some((_, inside)), None) => *inside += &format!("{line}\n"),
            (None, None) => prose += &format!("{line}\n"),
        }
    }
    assert!(open.is_none(), "a fence that is not closed");
    (prose, fences)
}

/// The name by which links find a heading: lower case, blanks as hyphens, without what is neither a letter, a digit nor one of these.
fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    heading.trim().to_lowercase().chars().filter(kept).map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_page_has_a_place_in_the_book() {
    let summary = read(&root().join("docs/SUMMARY.md"));
    for page in pages().iter().filter(|page| page.parent().is_some_and(|folder| folder.ends_with("docs"))) {
        let name = page.file_name().unwrap().to_str().unwrap();
        assert!(
            name == "SUMMARY.md" || summary.contains(&format!("({name})")),
            "docs/{name} is not in docs/SUMMARY.md"
        );
    }
}

#[test]
fn links_lead_to_files_and_headings_that_are_there() {
    let mut looked_at = 0;
    for page in pages() {
        let (prose, _) = parts(&read(&page));
        let targets = prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.contains("://")) {
            looked_at += 1;
            let (file, heading) = target.split_once('#').map_or((target, None), |(file, name)| (file, Some(name)));
            let path = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(path.exists(), "{}: the link to {target} leads nowhere", page.display());
            let Some(heading) = heading else { continue };
            let (prose, _) = parts(&read(&path));
            let there = prose
                .lines()
                .filter(|line| line.starts_with('#'))
                .any(|line| anchor(line.trim_start_matches('#')) == heading);
            assert!(there, "{}: {target}: no heading of that name", page.display());
        }
    }
    assert!(looked_at > 100, "{looked_at} links were found");
}

#[test]
fn what_the_book_includes_is_there() {
    for page in pages() {
        for include in read(&page).split("{{#include ").skip(1).filter_map(|rest| rest.split("}}").next()) {
            let (file, part) = include.split_once(':').map_or((include, None), |(file, part)| (file, Some(part)));
            let text = read(&page.parent().unwrap().join(file));
            let marks = part.map(|part| [format!("ANCHOR: {part} "), format!("ANCHOR_END: {part} ")]);
            assert!(marks.is_none_or(|marks| marks.iter().all(|mark| text.contains(mark))), "{include}");
        }
    }
}

#[test]
fn configurations_of_the_book_are_read() {
    let mut read_whole = 0;
    for page in pages() {
        for (language, text) in parts(&read(&page)).1 {
            let format = match language.as_str() {
                "toml" => Format::Toml,
                "yaml" => Format::Yaml,
                _ => continue,
            };
            // A page may show a part of a configuration: what each must have is then added.
            let named = |key: &str| text.lines().any(|line| line.starts_with(key));
            let whole = named("base_model");
            let missing: Vec<&str> =
                ["base_model=base", "train_data_dir=data", "output_dir=out", "sample_prompts=[\"a cat\"]"]
                    .into_iter()
                    .filter(|setting| !named(setting.split('=').next().unwrap()))
                    // Sliders are trained without pictures.
                    .filter(|setting| !(setting.starts_with("train_data_dir") && named("[[sliders]]")))
                    .collect();
            if let Err(error) = TrainConfig::from_text(&text, format, &missing) {
                panic!("{}: {error}\n{text}", page.display());
            }
            read_whole += usize::from(whole);
        }
    }
    assert!(read_whole >= 4, "{read_whole} whole configurations were found");
}
