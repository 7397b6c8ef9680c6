//! Sizes of memory as people write them.

/// Less than this is a forgotten unit, not a budget.
const LEAST: u64 = 16 << 20;

/// Bytes of `8GiB`, `8 GB`, `8G`, `7.5GiB`, `8192MiB` or a whole number of bytes. `GB` and `MB` are decimal, as drives
/// are sold; `G` and `M` are binary, as cards are.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let expected = || format!("expected a size such as \"8GiB\", \"7.5GiB\" or \"8192MiB\", found `{text}`");
    let trimmed = text.trim();
    let unit_at = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = (&trimmed[..unit_at], trimmed[unit_at..].trim());
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "gib" | "g" => f64::from(1 << 30),
        "mib" | "m" => f64::from(1 << 20),
        "gb" => 1e9,
        "mb" => 1e6,
        _ => return Err(expected()),
    };
    let bytes = number.parse::<f64>().ok().map(|number| number * factor).ok_or_else(expected)?;
    match bytes {
        // Beyond this, no machine and no exact number.
        bytes if bytes >= 1e15 => Err(format!("`{text}` is more memory than any device has")),
        bytes if bytes < LEAST as f64 => {
            Err(format!("`{text}` is {bytes} bytes, too little for any run; write the unit, such as \"8GiB\""))
        }
        bytes => Ok(bytes as u64),
    }
}

/// Bytes for people.
pub(crate) fn show(bytes: u64) -> String {
    match bytes {
        0x4000_0000.. => format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)),
        _ => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_written() {
        for (text, bytes) in [
            ("8GiB", 8 << 30),
            (" 8 gib ", 8 << 30),
            ("8G", 8 << 30),
            ("1.5GiB", 3 << 29),
            ("8GB", 8_000_000_000),
            ("512MiB", 512 << 20),
            ("512m", 512 << 20),
            ("8589934592", 8 << 30),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "8", "0GiB", "-8GiB", "8TiB", "GiB", "eight", "1.2.3GiB", "nanGiB", "1e99GiB", "99999999GiB"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert_eq!((show(3 << 29).as_str(), show(5 << 19).as_str()), ("1.50 GiB", "2.5 MiB"));
    }
}
