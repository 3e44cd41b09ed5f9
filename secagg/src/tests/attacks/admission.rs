//! Keys that the coordinator must not let in, because the devices around them would refuse them and leave.

use super::liar::known_key;
use crate::{
    AdmitError, Advertisement, AdvertisementError, Gathering,
    tests::world::{NOW, POPULATION, Script, World},
};

/// A registered device adds the point of order two to its signature's commitment R. One by one nobody accepts
/// that, together with others every second device does (Chalkias et al. 2020, "Taming the many EdDSAs"):
/// let in, it would end the sessions of about half of its neighbours.
#[test]
fn a_signature_that_holds_only_among_others() {
    let world = World::new(Script::default());
    let signature = "6ee77cdf2f7f7bfd7cb41f60a11c43fcd9eae84c9c35e4c994838fa668dec2dd\
        d166bf92c3cf37a6c4a85825a7780084877047bada8c9856d7a7c39539103507";
    let crooked = Advertisement {
        certificate: world.identities[0].certificate().clone(),
        share_key: known_key(1),
        mask_key: known_key(2),
        nonce: [0; 32],
        signature: hex::decode(signature).unwrap().try_into().unwrap(),
    };
    let (registrars, session) = (&world.policy.registrars, &world.terms.session);
    let among_others = Advertisement::verify_all(&[&crooked], session, registrars, POPULATION, NOW);
    assert_eq!(among_others, Ok(()), "one that the faster check lets pass");
    let mut gathering = Gathering::new(world.terms, POPULATION, registrars.clone());
    let refused = AdmitError::Advertisement(AdvertisementError::Signature);
    assert_eq!(gathering.admit(crooked, NOW), Err(refused));
}
