//! Damaged configurations: whatever is cut, doubled or changed in one, the importer answers, and says where what is wrong stands.

use lora_import::{Format, Options, Problems, Source, import};

const EXAMPLES: [(&str, &str, Format); 9] = [
    ("ai-toolkit", include_str!("inputs/ai_toolkit.yaml"), Format::Yaml),
    ("axolotl", include_str!("inputs/axolotl.yaml"), Format::Yaml),
    ("diffusion-pipe", include_str!("inputs/diffusion_pipe.toml"), Format::Toml),
    ("kohya_ss", include_str!("inputs/kohya_gui.json"), Format::Json),
    ("llama-factory", include_str!("inputs/llama_factory.yaml"), Format::Yaml),
    ("musubi-tuner", include_str!("inputs/musubi.sh"), Format::Command),
    ("onetrainer", include_str!("inputs/onetrainer.json"), Format::Json),
    ("sd-scripts", include_str!("inputs/sd_scripts.sh"), Format::Command),
    ("sd-scripts", include_str!("inputs/sd_scripts.toml"), Format::Toml),
];

/// Imports a text for a trainer, unknown keys refused.
fn outcome(tool: &str, format: Format, text: &str) -> Result<String, Problems> {
    let options = Options { tool: Some(tool.parse().unwrap()), ..Options::default() };
    import(&Source::text("run", format, text), &options).map(|imported| format!("{imported}{}", imported.config()))
}

/// What is wrong names the file, and a line or a key, unless it is of the whole file.
#[track_caller]
fn assert_told(result: Result<String, Problems>, of: &str) -> Option<Problems> {
    let problems = result.err()?;
    assert!(!problems.0.is_empty(), "{of}");
    for problem in &problems.0 {
        assert!(problem.place == "run" && problem.message.len() > 8, "{of}: {problem}");
        let whole = ["no ", "it is ", "not valid", "expected", "cannot read"]
            .iter()
            .any(|start| problem.message.starts_with(start));
        assert!(problem.line.is_some() || problem.key.is_some() || whole, "{of}: {problem}");
    }
    Some(problems)
}

#[test]
fn examples_are_taken_as_they_are() {
    for (tool, text, format) in EXAMPLES {
        assert!(outcome(tool, format, text).is_ok(), "{tool}: {:?}", outcome(tool, format, text));
    }
}

#[test]
fn half_written_files_are_told_of() {
    for (tool, text, format) in EXAMPLES {
        for (at, _) in text.char_indices().step_by(3) {
            assert_told(outcome(tool, format, &text[..at]), &text[..at]);
        }
        for (line, _) in text.lines().enumerate() {
            let but = |keep: usize| {
                let lines = text
                    .lines()
                    .enumerate()
                    .flat_map(|(own, text)| std::iter::repeat_n(text, if own == line { keep } else { 1 }));
                lines.collect::<Vec<_>>().join("\n")
            };
            for damaged in [but(0), but(2)] {
                assert_told(outcome(tool, format, &damaged), &damaged);
            }
        }
    }
}

#[test]
fn values_of_any_kind_are_taken_or_told_of_with_their_line() {
    let odd = [
        "null",
        "\"\"",
        "[]",
        "{}",
        "-1",
        "1e300",
        "0",
        "\"x\"",
        "true",
        "[1, \"a\", null]",
        "[[0.5, 2]]",
        "{a: 1}",
        "18446744073709551616",
    ];
    for (tool, text, format) in EXAMPLES {
        let sign = if format == Format::Toml { " = " } else { ": " };
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let Some((key, rest)) = line.split_once(sign).filter(|_| format != Format::Command) else { continue };
            for value in odd {
                let value = match format {
                    Format::Toml | Format::Json if value == "{a: 1}" => {
                        if format == Format::Toml {
                            "{ a = 1 }"
                        } else {
                            "{\"a\": 1}"
                        }
                    }
                    Format::Toml if value == "null" => "nan",
                    _ => value,
                };
                let end = if rest.trim_end().ends_with(',') { "," } else { "" };
                let mut changed = lines.clone();
                let own = format!("{key}{sign}{value}{end}");
                changed[number] = &own;
                let changed = changed.join("\n");
                assert_told(outcome(tool, format, &changed), &changed);
            }
        }
        // Options of a command.
        for (at, _) in text.match_indices(" --").filter(|_| format == Format::Command) {
            let end = text[at + 3..].find([' ', '\n']).map_or(text.len(), |length| at + 3 + length);
            for value in [" x y z", " -1", "=", " nan", " ''", " 1e300"] {
                let changed = format!("{}{value}{}", &text[..end], &text[end..]);
                assert_told(outcome(tool, format, &changed), &changed);
            }
        }
    }
}

#[test]
fn a_misspelt_key_is_told_of_with_its_line_and_the_nearest_known_one() {
    let cases = [
        ("diffusion-pipe", Format::Toml, "[optimizer]\nlr = 1\nbetass = [0.9, 0.99]\n", 3, "betas"),
        ("musubi-tuner", Format::Toml, "dit = 'x'\nnetwork_dimm = 4\n", 2, "network_dim"),
        (
            "sd-scripts",
            Format::Toml,
            "pretrained_model_name_or_path = 'x'\n[a]\nnetwork_alfa = 4\n",
            3,
            "network_alpha",
        ),
        ("onetrainer", Format::Json, "{\n\"training_method\": \"LORA\",\n\"learning_rte\": 1\n}", 3, "learning_rate"),
        (
            "ai-toolkit",
            Format::Yaml,
            "job: extension\nconfig:\n  process:\n  - train:\n      batch_sise: 1\n",
            5,
            "batch_size",
        ),
    ];
    for (tool, format, text, line, near) in cases {
        let problems = assert_told(outcome(tool, format, text), text).unwrap();
        let found = problems.0.iter().find(|problem| problem.message.contains(&format!("did you mean `{near}`")));
        assert_eq!(found.unwrap_or_else(|| panic!("{problems}")).line, Some(line), "{problems}");
    }
    let stranger = import(&Source::text("run", Format::Yaml, "trainer: other\nrank: 4\n"), &Options::default());
    let message = stranger.unwrap_err().to_string();
    assert!(message.contains("musubi-tuner") && message.contains("diffusion-pipe"), "{message}");
}
