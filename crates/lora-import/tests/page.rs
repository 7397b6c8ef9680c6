//! The page of the documentation is what the tables say.

#[test]
fn the_written_page_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/coming-from-other-trainers.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, lora_import::page()).unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), lora_import::page(), "run the tests with UPDATE_DOCS=1");
}
