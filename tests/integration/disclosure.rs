//! Everything that a device sends says in the schema what it discloses, and no field names the
//! device or its user.

use super::support::check_golden;
use fleetune_proto::wire::DESCRIPTORS;
use prost_reflect::{DescriptorPool, ExtensionDescriptor, FieldDescriptor, Kind, MessageDescriptor, Value};
use std::collections::BTreeMap;

/// Parts of names that a field sent by a device may not have.
const NAMING_A_DEVICE: [&str; 10] =
    ["user", "owner", "device_id", "client_id", "account", "email", "phone", "serial", "address", "location"];

#[test]
fn every_field_a_device_sends_says_what_it_discloses() {
    let pool = DescriptorPool::decode(DESCRIPTORS).expect("the compiled schema decodes");
    let disclosure =
        pool.get_extension_by_name("fleetune.annotations.v1.disclosure").expect("the annotation");
    let sent = fields_sent(&pool);
    assert!(sent.len() > 20, "only {} fields found", sent.len());
    let lines =
        sent.values().map(|field| format!("{} {}\n", field.full_name(), annotation(field, &disclosure)));
    check_golden("disclosure.txt", &lines.collect::<String>());
}

#[test]
fn no_field_names_the_device_or_its_user() {
    let pool = DescriptorPool::decode(DESCRIPTORS).expect("the compiled schema decodes");
    for field in fields_sent(&pool).values() {
        let named = NAMING_A_DEVICE.iter().find(|part| field.name().contains(*part));
        assert!(named.is_none(), "{} names a device or its user", field.full_name());
    }
}

/// The name of a field's annotation; it must be there and not be the unspecified one.
fn annotation(field: &FieldDescriptor, disclosure: &ExtensionDescriptor) -> String {
    let options = field.options();
    let value = options.get_extension(disclosure);
    let Value::EnumNumber(number) = value.as_ref() else { panic!("{}: {value:?}", field.full_name()) };
    assert_ne!(*number, 0, "{} has no disclosure annotation", field.full_name());
    let Kind::Enum(levels) = disclosure.kind() else { panic!("disclosure is an enum") };
    let level = levels.get_value(*number);
    level.unwrap_or_else(|| panic!("{}: unknown disclosure {number}", field.full_name())).name().into()
}

/// Every field that requests of our services hold, at any depth, by full name.
fn fields_sent(pool: &DescriptorPool) -> BTreeMap<String, FieldDescriptor> {
    let mut sent = BTreeMap::new();
    let ours = pool.services().filter(|service| service.package_name().starts_with("fleetune."));
    for method in ours.flat_map(|service| service.methods().collect::<Vec<_>>()) {
        collect(&method.input(), &mut sent);
    }
    sent
}

fn collect(message: &MessageDescriptor, sent: &mut BTreeMap<String, FieldDescriptor>) {
    for field in message.fields() {
        let inner = field.kind();
        let new = sent.insert(field.full_name().into(), field).is_none();
        if new && let Some(message) = inner.as_message() {
            collect(message, sent);
        }
    }
}
